from __future__ import annotations

import base64
import struct

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


def webp(kind: bytes, data: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


PREVIEW = segment(0xE1, b"Exif\0\0" + jpeg(width=9, height=9)[:500] + bytes(60_000))
LOSSY = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 640 | 1 << 14, 480) + bytes(20)
LOSSLESS = b"\x2f" + (639 | 479 << 14).to_bytes(4, "little") + bytes(20)
EXTENDED = bytes(4) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little")

IMAGES = {
    "PNG": png_bytes(640, 480),
    "GIF": b"GIF89a" + struct.pack("<HH", 640, 480) + bytes(30),
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
    "WAV": b"RIFF\0\0\0\0WAVEfmt " + bytes(50),
    "JPEG without a frame": b"\xff\xd8" + segment(0xDA, bytes(6)) + bytes(50),
    "JPEG of nothing but segments": b"\xff\xd8" + segment(0xE0, b"") * 500_000,
    "JPEG of nothing but fill bytes": b"\xff\xd8" + b"\xff" * 5_000_000,
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_what_is_no_such_image(data: bytes) -> None:
    assert read(data) is None
