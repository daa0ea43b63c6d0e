"""Reads width and height of an image from the first bytes of its file, without decoding it.

A PNG of one colour with 20,000 × 20,000 pixels has 50 KB and takes an engine 1.2 GB to decode.
"""

from __future__ import annotations

from base64 import b64decode
from struct import unpack

HEAD = 44  # characters of base64: 33 bytes, enough for all formats but JPEG
JPEG_HEAD = 256 * 1024  # characters: the size stands behind a preview and a colour profile
MAX_SEGMENTS = 1000  # of a JPEG before its size; cameras write some twenty
NOT_SIZES = frozenset({0xC4, 0xC8, 0xCC})  # the other markers from C0 to CF begin with the size
SCAN = 0xDA  # the pixels begin


def image_size(data: str) -> tuple[int, int] | None:
    """`data`: base64 that was checked. None if it is no PNG, JPEG, WebP or GIF."""
    head = b64decode(data[:HEAD])
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and len(head) >= 24:
        return _pair(">II", head[16:24])
    if head[:6] in (b"GIF87a", b"GIF89a") and len(head) >= 10:
        return _pair("<HH", head[6:10])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= 30:
        return _webp_size(head)
    if head[:3] == b"\xff\xd8\xff":
        size = _jpeg_size(b64decode(data[:JPEG_HEAD]))
        return _jpeg_size(b64decode(data)) if size is None and len(data) > JPEG_HEAD else size
    return None


def _pair(form: str, data: bytes) -> tuple[int, int]:
    width, height = unpack(form, data)
    return width, height


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """https://developers.google.com/speed/webp/docs/riff_container"""
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = _pair("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """From the frame header, which follows other segments: https://www.w3.org/Graphics/JPEG/itu-t81.pdf, B.2"""
    at = 2
    for _ in range(MAX_SEGMENTS):
        if len(data) < at + 9 or data[at] != 0xFF or data[at + 1] == SCAN:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in NOT_SIZES:
            height, width = _pair(">HH", data[at + 5 : at + 9])
            return width, height
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
