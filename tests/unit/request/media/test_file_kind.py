from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.media.file_kind import check_kind

FILES = {
    "WAV": (b"RIFF\x24\n\0\0WAVE", "audio"),
    "MP3 with a tag": (b"ID3\4" + bytes(8), "audio"),
    "MP3": (b"\xff\xfb\x90\x64" + bytes(8), "audio"),
    "AAC": (b"\xff\xf1\x50\x80" + bytes(8), "audio"),
    "FLAC": (b"fLaC\0\0\0\x22" + bytes(8), "audio"),
    "Ogg": (b"OggS" + bytes(8), "audio or video"),
    "WebM": (b"\x1aE\xdf\xa3" + bytes(8), "audio or video"),
    "M4A": (b"\0\0\0\x1cftypM4A ", "audio or video"),
    "MP4": (b"\0\0\0\x20ftypisom", "audio or video"),
    "AVI": (b"RIFF\x24\n\0\0AVI ", "video"),
    "MPEG": (b"\0\0\1\xba" + bytes(8), "video"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\r", "an image"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(8), "an image"),
    "GIF": (b"GIF89a" + bytes(6), "an image"),
    "WebP": (b"RIFF\x24\n\0\0WEBP", "an image"),
    "BMP": (b"BM" + bytes(10), "an image"),
    "AVIF": (b"\0\0\0\x1cftypavif", "an image"),
    "HEIC": (b"\0\0\0\x1cftypheic", "an image"),
    "an MP4 that is a TGA, too": (b"\0\0\2\0ftypisom", "a file of an unknown kind"),
    "PPM": (b"P6 9999 9999", "a file of an unknown kind"),
    "text": (b"hello, world", "a file of an unknown kind"),
    "nothing": (b"", "a file of an unknown kind"),
}


@pytest.mark.parametrize("wanted", ["audio", "video"])
@pytest.mark.parametrize(("head", "kind"), FILES.values(), ids=FILES)
def test_a_file_of_another_kind_is_refused(head: bytes, kind: str, wanted: Any) -> None:
    if wanted in kind:
        check_kind(head + b"more", wanted, "a.b")
        return
    with pytest.raises(BadRequestError, match=f"a.b is {kind}; it must be {wanted}: ") as refused:
        check_kind(head, wanted, "a.b")
    assert refused.value.param == "a.b"
