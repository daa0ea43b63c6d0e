"""Images made by hand, as data URLs, and content parts with them."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

Part = dict[str, Any]


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png_bytes(width: int = 32, height: int = 32, colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(colour) * width for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def png(width: int = 32, height: int = 32, colour: tuple[int, int, int] = (255, 0, 0)) -> str:
    return data_url(png_bytes(width, height, colour))


RED, BLUE = png(), png(colour=(0, 0, 255))


def image(url: str = RED, **fields: Any) -> Part:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def about(*parts: Part, text: str = "What is in this picture?") -> list[Part]:
    """The messages of a chat about them."""
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]
