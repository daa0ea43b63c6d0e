"""Consistent hashing: which member a key is at home with, and who is next where that one cannot take it.

A member that comes or goes moves only the keys that are its own. All proxies find the same without a word between them.
https://www.cs.princeton.edu/courses/archive/fall09/cos518/papers/chash.pdf
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Generic, Protocol, TypeVar

POINTS = 32  # of each member: of 64 each has 0.5 to 1.4 of a fair share of the keys; bounded loads do the rest


class Named(Protocol):
    name: str


M = TypeVar("M", bound=Named)


class HashRing(Generic[M]):
    def __init__(self, members: Sequence[M]) -> None:
        points = [(place(f"{member.name}#{n}"), member) for member in members for n in range(POINTS)]
        points.sort(key=lambda point: point[0])
        self._places = [point for point, _ in points]
        self._members = [member for _, member in points]

    def walk(self, key: str) -> Iterator[M]:
        """Each member once, the key's home first."""
        members, start = self._members, bisect(self._places, place(key))
        seen: set[str] = set()
        for index in range(start, start + len(members)):
            member = members[index % len(members)]
            if member.name not in seen:
                seen.add(member.name)
                yield member


def place(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
