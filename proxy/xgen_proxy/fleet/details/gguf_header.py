"""The shape of a model, from the first bytes of its GGUF file, since llama.cpp's servers do not report all of it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from xgen_proxy.dialects.backend_request import ModelFacts

# The keys about the architecture stand before the vocabulary, which has megabytes. What stands behind it stays unknown.
HEADER_BYTES = 256 * 1024
MAX_KEYS = 1024
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VOCABULARY = b"tokenizer.ggml.tokens"
MOST = 2**31


def read_gguf_header(path: Path) -> ModelFacts | None:
    """None for what is no GGUF file. Does not raise: the file may be anything, and may vanish."""
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_BYTES)
    except OSError:
        return None
    if data[:4] != b"GGUF":
        return None
    found: dict[bytes, int] = {}
    with contextlib.suppress(struct.error, EOFError):
        found.update(_numbers(data))
    shape = {key.partition(b".")[2]: value for key, value in found.items() if 0 < value < MOST}
    return ModelFacts(
        vocabulary=shape.get(b"ggml.tokens"),
        context=shape.get(b"context_length"),
        layers=shape.get(b"block_count"),
        width=shape.get(b"embedding_length"),
    )


def _numbers(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole numbers by key, and the length of the vocabulary. Raises EOFError or struct.error where data ends."""
    (keys,) = struct.unpack_from("<Q", data, 16)
    at = 24
    for _ in range(min(keys, MAX_KEYS)):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        if kind == ARRAY:
            item, length = struct.unpack_from("<IQ", data, at + 4)
            if key == VOCABULARY:
                yield key, length
                return
            at = _behind_array(data, at + 16, item, length)
        elif kind == STRING:
            _, at = _string(data, at + 4)
        elif kind in SCALARS:
            (value,) = struct.unpack_from(f"<{SCALARS[kind]}", data, at + 4)
            at += 4 + struct.calcsize(f"<{SCALARS[kind]}")
            if type(value) is int:
                yield key, value
        else:
            raise EOFError


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise EOFError
    return data[at + 8 : end], end


def _behind_array(data: bytes, at: int, item: int, length: int) -> int:
    if length > len(data) or (item != STRING and item not in SCALARS):
        raise EOFError
    if item in SCALARS:
        return at + length * struct.calcsize(f"<{SCALARS[item]}")
    for _ in range(length):
        _, at = _string(data, at)
    return at
