"""Finds the short fields of a multipart form without touching the file in it: https://www.rfc-editor.org/rfc/rfc7578

The body is held whole, as any other is, since a later attempt sends it again; so the fields are slices of it. A parser
that copies each part out of it, as python-multipart does, would double what an upload holds. To find the ends of the
parts of 25 MB takes 16 ms at worst, if the file is made of all but boundaries.

The backend parses the form once more. So a form that the two might read differently is refused: two models, or an
escaped quote. tests/fuzz/test_forms.py compares what was read with what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from xgen_proxy.errors import BadRequestError, UnsupportedMediaTypeError
from xgen_proxy.request.fields import NAME_LENGTH
from xgen_proxy.request.media.file_kind import HEAD, check_kind
from xgen_proxy.request.parsing import OTHER_HINTS
from xgen_proxy.values import frozen

MAX_PARTS = 64  # OpenAI's transcription has ten fields, two of them lists
MAX_PART_HEAD = 4096  # bytes of a part's headers; a file name has 255 at most
READ = ("model", "stream", *sorted(OTHER_HINTS))

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # https://www.rfc-editor.org/rfc/rfc9110#name-tokens
OTHERS = rb"(?:[ \t]*;[ \t]*(?!boundary)" + TOKEN + rb"=" + TOKEN + rb")*"  # such as charset=UTF-8
BOUNDARY = re.compile(
    rb"multipart/form-data" + OTHERS + rb"[ \t]*;[ \t]*boundary=(\"?)([0-9A-Za-z'()+_,./:=?-]{1,70})\1" + OTHERS,
    re.IGNORECASE,
)
HEADER = re.compile(rb"(" + TOKEN + rb"):([^\r\n\0]*)")
DISPOSITION = re.compile(rb"form-data[ \t]*(?=;)", re.IGNORECASE)
# No \" in a value: llama-server's parser takes its quote for the end, and what follows for other parameters.
PARAMETER = re.compile(rb';[ \t]*(name|filename\*?)=("(?:[^"\\]|\\(?!"))*"|[^\s;"\\]*)[ \t]*', re.IGNORECASE)


@frozen
class Part:
    """A field of the form: `raw[start:end]` is its value, `raw[begin:end]` all of it from its delimiter on."""

    name: bytes
    begin: int
    start: int
    end: int
    is_file: bool


@frozen
class Form:
    """`raw`: the bytes of the body. `fields`: those of READ."""

    raw: bytes
    boundary: bytes
    parts: tuple[Part, ...]
    fields: Mapping[str, str]

    @property
    def content_type(self) -> bytes:
        """The header for a backend."""
        quote = b"" if re.fullmatch(TOKEN, self.boundary) else b'"'
        return b"multipart/form-data; boundary=" + quote + self.boundary + quote

    @property
    def stream(self) -> bool:
        return self.fields.get("stream", "").lower() in ("true", "1", "on", "yes")  # what pydantic takes as true

    def encoded(self, model: str, known: Set[bytes]) -> bytes:
        """The form for a backend that knows the model as `model`, with the fields that are `known`."""
        if model == self.fields.get("model") and all(part.name in known for part in self.parts):
            return self.raw
        dropped = [part for part in self.parts if part.name not in known or part.name == b"model"]
        first = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b' % (self.boundary, model.encode())
        pieces: list[bytes | memoryview] = [first]
        if not dropped or dropped[0].begin > 0:  # only the delimiter of the first part has no line break before it
            pieces.append(b"\r\n")
        raw, at = memoryview(self.raw), 0
        for part in dropped:
            pieces.append(raw[at : part.begin])
            at = part.end
        return b"".join([*pieces, raw[at:]])


def boundary_of(headers: Mapping[bytes, bytes]) -> bytes:
    """Raises UnsupportedMediaTypeError, BadRequestError."""
    content_type = headers.get(b"content-type", b"")
    if content_type.split(b";")[0].strip().lower() != b"multipart/form-data":
        raise UnsupportedMediaTypeError("send the request as a form, with the header Content-Type: multipart/form-data")
    found = BOUNDARY.fullmatch(content_type.strip())
    if found is None:
        raise BadRequestError("Content-Type must be multipart/form-data; boundary=… with the boundary of the form")
    return found[2]


def read_form(raw: bytes, headers: Mapping[bytes, bytes]) -> Form:
    """Raises UnsupportedMediaTypeError, BadRequestError."""
    boundary = boundary_of(headers)
    parts = tuple(_parts(raw, boundary))
    found = {name: _text(raw, parts, name.encode()) for name in READ}
    fields = {name: value for name, value in found.items() if value is not None}
    for part in parts:
        if part.is_file or part.name == b"file":
            check_kind(raw[part.start : min(part.end, part.start + HEAD)], "audio", "file")
    return Form(raw, boundary, parts, fields)


def _parts(raw: bytes, boundary: bytes) -> list[Part]:
    delimiter = b"\r\n--" + boundary
    if not raw.startswith(delimiter[2:]):
        raise BadRequestError("the form must begin with its boundary, the one that Content-Type names")
    parts: list[Part] = []
    begin, at = 0, len(delimiter) - 2
    while raw[at : at + 2] == b"\r\n":
        if len(parts) == MAX_PARTS:
            raise BadRequestError(f"the form has more than {MAX_PARTS} fields")
        head_end = raw.find(b"\r\n\r\n", at, at + MAX_PART_HEAD)
        if head_end < 0:
            raise BadRequestError(f"a field of the form has no headers, or more than {MAX_PART_HEAD} bytes of them")
        name, is_file = _read_head(raw[at + 2 : head_end])
        start = head_end + 4
        end = raw.find(delimiter, start)
        if end < 0:
            raise BadRequestError("the form is cut short: its last boundary is missing")
        parts.append(Part(name, begin, start, end, is_file))
        begin, at = end, end + len(delimiter)
    if raw[at : at + 4] not in (b"--", b"--\r\n") or len(raw) > at + 4:
        raise BadRequestError("the form must end with its last boundary, followed by --")
    return parts


def _read_head(head: bytes) -> tuple[bytes, bool]:
    """The field's name, and whether it is a file."""
    disposition = None
    for line in head.split(b"\r\n"):
        header = HEADER.fullmatch(line)
        if header is None:
            raise BadRequestError("a field of the form has a malformed header")
        if header[1].lower() == b"content-disposition":
            if disposition is not None:
                raise BadRequestError("a field of the form has two Content-Disposition headers")
            disposition = header[2].strip(b" \t")
    parameters = _parameters(disposition or b"")
    name = parameters.get(b"name", b"")
    if name.startswith(b'"'):
        name = name[1:-1]
    if not name or b"\\" in name:
        raise BadRequestError('each field of the form needs the header Content-Disposition: form-data; name="…"')
    return name, b"filename" in parameters or b"filename*" in parameters


def _parameters(disposition: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    form_data = DISPOSITION.match(disposition)
    at = form_data.end() if form_data else 0
    while at < len(disposition):
        parameter = PARAMETER.match(disposition, at)
        if parameter is None or parameter[1].lower() in found:
            raise BadRequestError("a field of the form has a malformed Content-Disposition header")
        found[parameter[1].lower()] = parameter[2]
        at = parameter.end()
    return found


def _text(raw: bytes, parts: tuple[Part, ...], name: bytes) -> str | None:
    """The value of a field that may be given once, None if it is not given."""
    found = [part for part in parts if part.name == name]
    if not found:
        return None
    field = name.decode()
    if len(found) > 1:
        raise BadRequestError(f"the form has {len(found)} fields named {field}; send one", param=field)
    [part] = found
    if part.is_file:
        raise BadRequestError(f"{field} must be a text, not a file", param=field)
    if part.end - part.start > NAME_LENGTH:
        raise BadRequestError(f"{field} has {part.end - part.start} bytes; the limit is {NAME_LENGTH}", param=field)
    try:
        return raw[part.start : part.end].decode()
    except UnicodeDecodeError:
        raise BadRequestError(f"{field} is not UTF-8", param=field) from None
