"""Reads width and height of an image from its file, without decoding it.

A PNG of one colour with 20,000 × 20,000 pixels has 50 KB and takes an engine 1.2 GB to decode. So the size must be the
one that the engine's decoder finds: the file is read up to its pixels, and one that decoders may read differently has
no size. The tests compare with Pillow, which vLLM uses; of an animation, that and llama-server decode the first frame.
"""

from __future__ import annotations

from base64 import b64decode
from struct import unpack

HEADS = (4096, 256 * 1024)  # characters of base64 that are tried before the whole: few files need more than the first
MAX_STEPS = 1000  # chunks, segments or blocks before the pixels; cameras write some twenty
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a JPEG that begin with the size
SEGMENTS = FRAMES | {0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # all have a length
SCAN = 0xDA  # the pixels begin

CONTROL, APPLICATION, COMMENT = 0xF9, 0xFF, 0xFE  # extensions of a GIF


def image_size(data: str) -> tuple[int, int] | None:
    """`data`: base64 that was checked. None if it is no PNG, JPEG, WebP or GIF, or no well-formed one."""
    for length in HEADS:
        size = _read_size(b64decode(data[:length]))
        if size is not None or length >= len(data):
            return size
    return _read_size(b64decode(data))


def _read_size(data: bytes) -> tuple[int, int] | None:
    """Also None if `data` ends before the size is certain."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_size(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif_size(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    return None


def _pair(form: str, data: bytes) -> tuple[int, int]:
    width, height = unpack(form, data)
    return width, height


def _png_size(data: bytes) -> tuple[int, int] | None:
    """https://www.w3.org/TR/png-3/#5Chunk-layout. Of two headers before the pixels, Pillow takes the last."""
    if data[8:16] != b"\0\0\0\rIHDR":
        return None
    at = 33  # after the header
    for _ in range(MAX_STEPS):
        kind = data[at + 4 : at + 8]
        if kind == b"IDAT":
            return _pair(">II", data[16:24])
        if len(kind) < 4 or kind == b"IHDR":
            return None
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """From the frame header, which stands among other segments: https://www.w3.org/Graphics/JPEG/itu-t81.pdf, B.2.
    Decoders differ in what they do about a marker without a length."""
    size: tuple[int, int] | None = None
    at = 2
    for _ in range(MAX_STEPS):
        if len(data) < at + 4 or data[at] != 0xFF:
            return None
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == SCAN:
            return size
        if marker not in SEGMENTS or length < 2:
            return None
        if marker in FRAMES:
            if size is not None or length < 8 or len(data) < at + 9:
                return None
            height, width = _pair(">HH", data[at + 5 : at + 9])
            size = width, height
        at += 2 + length
    return None


def _gif_size(data: bytes) -> tuple[int, int] | None:
    """Of the screen, if the first frame lies within: Pillow enlarges the screen otherwise.
    https://www.w3.org/Graphics/GIF/spec-gif89a.txt"""
    at = _first_frame(data, 13 + _palette_length(data[10])) if len(data) >= 13 else None
    if at is None or data[at : at + 1] != b"," or len(data) < at + 10:
        return None
    if len(data) <= at + 10 + _palette_length(data[at + 9]):  # Pillow would try other formats
        return None
    width, height = _pair("<HH", data[6:10])
    left, top, frame_width, frame_height = unpack("<HHHH", data[at + 1 : at + 9])
    return (width, height) if left + frame_width <= width and top + frame_height <= height else None


def _first_frame(data: bytes, at: int) -> int | None:
    """Where the extensions end that begin at `at`."""
    steps = iter(range(MAX_STEPS))  # for all of them together
    for _ in steps:
        if data[at : at + 1] != b"!" or len(data) < at + 2:
            return at
        label, at = data[at + 1], at + 2
        blocks: list[int] = []
        for _ in steps:
            length = data[at] if at < len(data) else 0
            at += 1 + length
            if length == 0:
                break
            blocks.append(length)
        else:
            return None
        if not _is_plain_extension(label, blocks):
            return None
    return None


def _palette_length(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _is_plain_extension(label: int, blocks: list[int]) -> bool:
    """Whether all decoders find the same end of an extension, whose blocks have these lengths. Where Pillow expects a
    block and there is none, it takes what follows for one."""
    if label == CONTROL:
        return blocks == [4]
    return label == COMMENT or len(blocks) >= (2 if label == APPLICATION else 1)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """libwebp refuses frames that exceed the canvas: https://developers.google.com/speed/webp/docs/riff_container"""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = _pair("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None
