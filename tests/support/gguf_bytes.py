"""The bytes of small GGUF headers."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def gguf(*pairs: bytes, keys: int | None = None, tensors: Sequence[bytes] = ()) -> bytes:
    """A header with these keys and descriptions of tensors. `keys`: the number of them that it claims."""
    return (
        b"GGUF"
        + struct.pack("<IQQ", 3, len(tensors), len(pairs) if keys is None else keys)
        + b"".join([*pairs, *tensors])
    )


def key_value(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
