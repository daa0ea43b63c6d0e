"""Whatever an image is made of, the proxy counts as many pixels as Pillow, which vLLM opens it with, or refuses it."""

from __future__ import annotations

import base64
import random
import struct
import warnings
import zlib
from io import BytesIO
from typing import Any

from PIL import Image

from tests.support.fuzzing import examples, mutated, reported
from xgen_proxy.request.media.image_size import image_size

LARGE = 13_000


def saved(form: str, **options: Any) -> bytes:
    out = BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


OTHERS = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned
FORMS = {
    b"\x89PNG": [saved("PNG"), saved("PNG", save_all=True, append_images=OTHERS), saved("PNG", exif=EXIF, dpi=(9, 9))],
    b"\xff\xd8": [
        saved("JPEG"), saved("JPEG", progressive=True, comment=b"a", exif=EXIF), saved("JPEG", restart_marker_rows=1),
    ],
    b"GIF": [saved("GIF"), saved("GIF", save_all=True, append_images=OTHERS, loop=0, duration=9, comment=b"a" * 300)],
    b"RIFF": [
        saved("WEBP"), saved("WEBP", lossless=True), saved("WEBP", exif=EXIF),
        saved("WEBP", save_all=True, append_images=OTHERS),
    ],
}  # fmt: skip
FRAME = struct.pack(">BHHB", 8, LARGE, LARGE, 3) + b"\1\x11\0\2\x11\1\3\x11\1"
PIECES: dict[bytes, list[bytes]] = {
    b"\x89PNG": [
        chunk(b"IHDR", struct.pack(">IIBBBBB", LARGE, LARGE, 8, 2, 0, 0, 0)), chunk(b"tEXt", b"a\0b"),
        chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"IEND", b""), chunk(b"abcd", bytes(9)), b"\0\0\0\1IDAT",
    ],
    b"\xff\xd8": [
        b"\xff\xc0\0\x11" + FRAME, b"\xff\xde\0\x11" + FRAME, b"\xff\xd0", b"\xff\x01", b"\xff\xff", b"\xff\0",
        b"\xff\xe0\0\0", b"\xff\xe0\0\1", b"\xff\xe0\0\x15", b"\xff\xd8", b"\xff\xd9", b"\xff\xc8\0\2", b"\xff\xda",
    ],
    b"GIF": [
        b"," + struct.pack("<HHHHB", 0, 0, LARGE, LARGE, 0) + b"\2\0", b"!\xf9\0", b"!\x01\0", b"!\xfe\0",
        b"!\xfe\1a\0", b"!\xf9\1\1\0", b"!\xff\x0bNETSCAPE2.0\0", b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0", b";", b"\0", b"!",
        b",", b"\x0c", b"\nImage size (x*y): 13000*13000\n\x1a",
    ],
    b"RIFF": [
        b"VP8X\x0a\0\0\0" + bytes(4) + b"\xc7\x32\0" * 2, b"VP8X", b"VP8L", b"VP8 ", b"ANIM\6\0\0\0" + bytes(6),
        b"ANMF", b"\x3f\x80\0\0",
    ],
}  # fmt: skip


def image(rng: random.Random) -> bytes:
    """Some pieces are put in or over what stands there, mostly where an image says what it is."""
    magic = rng.choice(list(FORMS))
    data = bytearray(rng.choice(FORMS[magic]))
    for _ in range(rng.randrange(3)):
        at = rng.choice([2, 10, 12, 13, 20, 21, 33, 785, 789, rng.randrange(80), rng.randrange(len(data))])
        piece = rng.choice([*PIECES[magic], rng.randbytes(2)])
        data[at : at + rng.choice([0, 0, len(piece)])] = piece
    return bytes(data) if rng.random() < 0.7 else mutated(rng, bytes(data))


def pillow_size(data: bytes) -> tuple[int, int] | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(BytesIO(data)).size
    except Image.DecompressionBombError:
        return "huge"
    except Exception as error:  # each plugin raises what it likes
        return repr(error)


def test_pillow_finds_the_size_that_was_counted() -> None:
    counted = 0
    for rng in examples():
        for _ in range(20):
            data = image(rng)
            with reported(data[:1000].hex()):
                found = image_size(base64.b64encode(data).decode())
                size = pillow_size(data) if found else None
                if found and size == "huge":
                    assert found[0] * found[1] > (Image.MAX_IMAGE_PIXELS or 0)
                elif isinstance(size, tuple):
                    counted += 1
                    assert size == found
    assert counted > 500, "most of these images should be well-formed"


def test_each_plain_image_is_read() -> None:
    for data in [each for forms in FORMS.values() for each in forms]:
        assert image_size(base64.b64encode(data).decode()) == pillow_size(data) == (40, 30)
