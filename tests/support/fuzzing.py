"""Inputs generated from a seed, cut and mutated. A failure names its seed, its number and its input.

XGEN_FUZZ_EXAMPLES (default 300) is their number for each test, XGEN_FUZZ_SEED (default 0) what they are made from.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

EXAMPLES = int(os.environ.get("XGEN_FUZZ_EXAMPLES", "300"))
SEED = os.environ.get("XGEN_FUZZ_SEED", "0")
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\n\n", b":", b" ", b"\0", b"data: ", b"data", b"event: error\n", b"error: ", b"[DONE]",
    b'{"error":', b'"finish_reason":"abort"', b'"choices":', b"null", b"{", b"}", b"[", b"]", b'"', b"\xef\xbb\xbf",
    b"\xff", b"1e999", b"HTTP/1.1 200 OK\r\n", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n",
    b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"-1",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 5, 2**31, 2**63, 2**64 - 1, 0.5, 1e308, "", "x", "null", "\0", "\u4e2d" * 20,
    "\U0001f600", [], [None], [[]], {}, {"a": 1}, {"type": "text"}, [{"type": "text", "text": 5}], ["a", 5],
    [[1, 2], [3]],
]  # fmt: skip


def examples() -> Iterator[random.Random]:
    """A source of randomness for each example."""
    for number in range(EXAMPLES):
        with reported(f"XGEN_FUZZ_SEED={SEED}, example {number}"):
            yield random.Random(f"{SEED}/{number}")


@contextlib.contextmanager
def reported(what: object) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(str(what)[:4000])
        raise


def cut(rng: random.Random, data: bytes, most: int = 6) -> list[bytes]:
    """The data in pieces, cut anywhere."""
    at = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(most)))
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes replaced, removed, repeated and added in a few places; sometimes none."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((0, 1, 1, 4, 40))
        piece = rng.choice((rng.choice(TOKENS), rng.randbytes(rng.randrange(4)), bytes(out[at : at + length]) * 2))
        out[at : at + length] = piece
    return bytes(out)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A copy with one to three of its values replaced, removed or put elsewhere."""
    root = [clone(value)]
    for _ in range(rng.randrange(1, 4)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            holder[key] = clone(rng.choice(VALUES))
        elif action < 0.75 and holder is not root:
            del holder[key]
        elif action < 0.9:
            other, name = rng.choice(places)
            holder[key] = clone(other[name])
        else:
            holder[key] = [clone(holder[key])] * rng.randrange(3)
    return root[0]


def clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: clone(each) for key, each in value.items()}
    return [clone(each) for each in value] if isinstance(value, list) else value


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) below."""
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        yield holder, key
        if isinstance(value, dict | list):
            yield from _places(value)
