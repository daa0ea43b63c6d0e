"""Multipart forms, byte by byte."""

from __future__ import annotations

BOUNDARY = b"----xyz"
FORM = f"multipart/form-data; boundary={BOUNDARY.decode()}"
AUDIO = b"RIFF\0\0\0\0WAVE\r\n\r\n--not the boundary\r\n"


def field(name: str, value: bytes, more: str = "") -> bytes:
    return b'Content-Disposition: form-data; name="%b"%b\r\n\r\n%b' % (name.encode(), more.encode(), value)


def file(value: bytes = AUDIO) -> bytes:
    return field("file", value, '; filename="a b.wav"\r\nContent-Type: audio/wav')


def form(*parts: bytes, boundary: bytes = BOUNDARY) -> bytes:
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--%b--\r\n" % boundary
