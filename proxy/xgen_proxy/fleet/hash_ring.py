"""Consistent hashing: the home of a key among the replicas of a backend, and the order of the others after it.

Adding or removing a name moves only the keys whose home it is. All proxies compute the same ring without talking to
each other. https://www.cs.princeton.edu/courses/archive/fall09/cos518/papers/chash.pdf
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

POINTS = 32  # per name: with 64 names each gets 0.5 to 1.4 of a fair share of the keys; bounded loads do the rest


class HashRing:
    """A ring of names. walk() yields their indexes in `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        points = sorted((hash_of(f"{name}#{n}"), index) for index, name in enumerate(names) for n in range(POINTS))
        self._hashes = [point for point, _ in points]
        self._indexes = [index for _, index in points]

    def walk(self, key: str) -> Iterator[int]:
        """Each index once, the key's home first."""
        indexes, start = self._indexes, bisect(self._hashes, hash_of(key))
        seen: set[int] = set()
        for position in range(start, start + len(indexes)):
            index = indexes[position % len(indexes)]
            if index not in seen:
                seen.add(index)
                yield index


@lru_cache(maxsize=16)  # 1,000 names cost 32,000 hashes; a replay loads the same names again and again
def ring_of(names: tuple[str, ...]) -> HashRing:
    return HashRing(names)


def hash_of(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
