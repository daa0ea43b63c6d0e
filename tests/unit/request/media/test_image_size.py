from __future__ import annotations

import base64
import struct
import zlib

import pytest

from tests.support.images import png_bytes
from xgen_proxy.request.media.image_size import image_size


def read(data: bytes) -> tuple[int, int] | None:
    return image_size(base64.b64encode(data).decode())


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg(*before: bytes, marker: int = 0xC0, width: int = 640, height: int = 480) -> bytes:
    frame = segment(marker, struct.pack(">BHHB", 8, height, width, 3) + bytes(9))
    return b"\xff\xd8" + b"".join(before) + frame + segment(0xDA, bytes(6)) + bytes(50)


def with_marker(marker: int) -> bytes:
    """A JPEG with a marker that has no length. A reader that expects one takes it from the next segment, and then
    finds a frame of one pixel within that segment."""
    small = segment(0xC0, struct.pack(">BHHB", 8, 1, 1, 3) + bytes(9)) + segment(0xDA, bytes(6))
    next_one = segment(0xE0, (bytes(0xFFE0 - 4) + small).ljust(65_533, b"\0"))
    return jpeg(bytes([0xFF, marker]), next_one, width=13_000, height=13_000)


def gif(*before: bytes, width: int = 640, height: int = 480) -> bytes:
    """With one frame of this size, on a screen of 640 × 480 pixels."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 640, 480, 0x81, 0, 0) + bytes(12)
    return screen + b"".join(before) + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2\x4c\1\0;"


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG of 640 × 480 pixels with another chunk behind its header."""
    chunk = kind + data
    plain = png_bytes(640, 480)
    return plain[:33] + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]


def webp(kind: bytes, data: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


PREVIEW = segment(0xE1, b"Exif\0\0" + jpeg(width=9, height=9)[:500] + bytes(60_000))
LOSSY = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 640 | 1 << 14, 480) + bytes(20)
LOSSLESS = b"\x2f" + (639 | 479 << 14).to_bytes(4, "little") + bytes(20)
EXTENDED = bytes(4) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little")

IMAGES = {
    "PNG": png_bytes(640, 480),
    "PNG with a long profile": with_chunk(b"iCCP", bytes(300_000)),
    "GIF": gif(),
    "GIF with a smaller frame": gif(width=1, height=1),
    "GIF with extensions": gif(b"!\xfe\1a\2bc\0", b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0", b"!\xf9\4\0\0\0\0\0"),
    "JPEG": jpeg(),
    "progressive JPEG": jpeg(marker=0xC2),
    "JPEG with tables first": jpeg(segment(0xC4, bytes(30)), segment(0xDB, bytes(65))),
    "JPEG with fill bytes": jpeg(b"\xff\xff" + segment(0xE0, bytes(14))),
    "JPEG with a preview": jpeg(PREVIEW),
    "JPEG behind long profiles": jpeg(*[segment(0xE2, bytes(65_000))] * 8),
    "lossy WebP": webp(b"VP8 ", LOSSY),
    "lossless WebP": webp(b"VP8L", LOSSLESS),
    "WebP with an alpha channel": webp(b"VP8X", EXTENDED),
}


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)
def test_size(data: bytes) -> None:
    assert read(data) == (640, 480)


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)
def test_a_file_that_is_cut_is_no_image_or_has_the_right_size(data: bytes) -> None:
    for length in range(1, 60):
        assert read(data[:length]) in (None, (640, 480))


OTHERS = {
    "nothing": b"",
    "text": b"hello",
    "PDF": b"%PDF-1.7" + bytes(50),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "TIFF": b"II*\0" + bytes(50),
    "BMP": b"BM" + bytes(50),
    "PNG with two headers": with_chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)),
    "PNG of nothing but chunks": png_bytes()[:33] + (bytes(4) + b"tEXt" + bytes(4)) * 500_000,
    "PNG with a long header": png_bytes().replace(b"\x0dIHDR", b"\x0eIHDR"),
    "GIF with a frame that exceeds the screen": gif(width=13_000, height=13_000),
    "GIF whose frame is hidden from Pillow": gif(b"!\x01\0" + b"\1"),
    "GIF with an application of one block": gif(b"!\xff\x0bNETSCAPE2.0\0"),
    "GIF with a short control block": gif(b"!\xf9\1\1\0"),
    "GIF of nothing but blocks": gif(b"!\xfe" + b"\1a" * 500_000 + b"\0"),
    "GIF of nothing but extensions": gif(b"!\xfe\0" * 500_000),
    "GIF with another block": gif(b"\0"),
    "GIF without pixels": gif()[:35],
    "JPEG with a marker without a length": with_marker(0xD0),
    "JPEG with a temporary marker": with_marker(0x01),
    "JPEG with a second beginning": with_marker(0xD8),
    "JPEG with a segment of no length": jpeg(b"\xff\xe0\0\0"),
    "JPEG with two frames": jpeg(jpeg(width=9, height=9)[2:21]),
    "JPEG with a hierarchy": jpeg(segment(0xDE, struct.pack(">BHHB", 8, 9, 9, 3) + bytes(9))),
    "JPEG with a short frame": b"\xff\xd8" + segment(0xC0, bytes(5)) + segment(0xDA, bytes(6)),
    "JPEG with bytes between segments": jpeg(b"\0\0"),
    "WAV": b"RIFF\0\0\0\0WAVEfmt " + bytes(50),
    "JPEG without a frame": b"\xff\xd8" + segment(0xDA, bytes(6)) + bytes(50),
    "JPEG of nothing but segments": b"\xff\xd8" + segment(0xE0, b"") * 500_000,
    "JPEG of nothing but fill bytes": b"\xff\xd8" + b"\xff" * 5_000_000,
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_what_is_no_such_image(data: bytes) -> None:
    assert read(data) is None
