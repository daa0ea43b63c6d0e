"""The bytes of small GGUF headers."""

from __future__ import annotations

import struct


def gguf(*pairs: bytes, keys: int | None = None) -> bytes:
    """A header with these keys. `keys`: the number of them that it claims."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs) if keys is None else keys) + b"".join(pairs)


def key_value(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
