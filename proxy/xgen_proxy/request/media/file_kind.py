"""Whether a file is audio or video, from its first bytes.

llama-server decodes by these, whatever the type of the part says: it would read an image that is sent as audio, and
nobody would have counted its pixels. How long audio is when it is decoded, only the engine finds out.
"""

from __future__ import annotations

import re
from typing import Literal

from xgen_proxy.errors import BadRequestError

HEAD = 12  # bytes that tell
# https://en.wikipedia.org/wiki/List_of_file_signatures. AVIF and HEIC are images in a container of MP4's. A header of
# MP4's with 512 bytes or more could be that of a TGA, too, which llama-server reads.
SIGNATURES = {
    "an image": rb"\x89PNG|\xff\xd8|GIF8|RIFF.{4}WEBP|BM|II\*\0|MM\0\*|8BPS|.{4}ftyp(?:avi|hei|hev|mif|msf)",
    "audio": rb"RIFF.{4}WAVE|ID3|fLaC|\xff[\xe0-\xff]",
    "video": rb"RIFF.{4}AVI |\0\0\x01\xba",
    "audio or video": rb"OggS|\x1aE\xdf\xa3|\0\0\0.ftyp",
}
PATTERNS = {kind: re.compile(signature, re.DOTALL) for kind, signature in SIGNATURES.items()}
FORMATS = {"audio": "WAV, MP3, FLAC, Ogg, M4A, MP4 or WebM", "video": "MP4, WebM, AVI, Ogg or MPEG"}


def check_kind(head: bytes, wanted: Literal["audio", "video"], name: str) -> None:
    """`head`: HEAD bytes or more. Raises BadRequestError."""
    found = next((kind for kind, pattern in PATTERNS.items() if pattern.match(head)), "a file of an unknown kind")
    if wanted not in found:
        raise BadRequestError(f"{name} is {found}; it must be {wanted}: {FORMATS[wanted]}", param=name)
