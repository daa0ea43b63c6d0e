from __future__ import annotations

import pytest

from tests.support.forms import AUDIO, BOUNDARY, FORM, field, file, form
from xgen_proxy.errors import BadRequestError, UnsupportedMediaTypeError
from xgen_proxy.request.opaque.multipart import MAX_PART_HEAD, MAX_PARTS, Form, boundary_of, read_form

MODEL = field("model", b"whisper")
KNOWN = frozenset({b"model", b"file", b"language"})


def read(*parts: bytes) -> Form:
    return read_form(form(*parts), {b"content-type": FORM.encode()})


def refusal(raw: bytes, content_type: str = FORM) -> str:
    with pytest.raises(BadRequestError) as caught:
        read_form(raw, {b"content-type": content_type.encode()})
    return caught.value.message


def test_model_and_stream_are_read_and_the_file_is_not() -> None:
    found = read(file(), MODEL, field("stream", b"True"), field("language", b"en"))
    assert (found.fields["model"], found.stream) == ("whisper", True)
    assert [part.name for part in found.parts] == [b"file", b"model", b"stream", b"language"]
    assert found.raw[found.parts[0].start : found.parts[0].end] == AUDIO


def test_hints_may_be_fields() -> None:
    found = read(field("backend", b"vllm"), file(), field("session_id", b"s"), field("urgency", b"low"))
    assert found.fields == {"backend": "vllm", "session_id": "s"}


@pytest.mark.parametrize("value", [b"false", b"0", b"", b"whatever"])
def test_only_true_is_a_stream(value: bytes) -> None:
    assert not read(MODEL, field("stream", value)).stream


def test_a_form_may_have_no_model() -> None:
    assert read(file()).fields == read().fields == {}
    assert read(field("model", b"")).fields == {"model": ""}


def test_names_may_be_unquoted_and_in_capitals() -> None:
    """As .NET's HttpClient and others write them."""
    part = b"content-type: text/plain; charset=utf-8\r\ncontent-disposition: Form-Data; Name=model\r\n\r\nwhisper"
    assert read(part, file()).fields == {"model": "whisper"}


def test_a_file_may_have_any_name_without_an_escaped_quote() -> None:
    for name in (
        r'; filename="C:\a b\c;d.wav"',
        "; filename*=utf-8''%22a",
        "; filename=\"%22a%22\"; filename*=UTF-8''a",
    ):
        [part] = read(field("file", AUDIO, name)).parts
        assert (part.name, part.is_file) == (b"file", True)


def test_the_name_that_the_backend_knows_is_put_in_and_nothing_else_changes() -> None:
    sent = [file(), MODEL, field("language", b"en")]
    found = read(*sent)
    assert found.encoded("whisper", KNOWN) is found.raw
    again = read_form(found.encoded("served", KNOWN), {b"content-type": FORM.encode()})
    assert again.raw == form(field("model", b"served"), file(), field("language", b"en"))
    assert again.encoded("whisper", KNOWN - {b"language"}) == form(MODEL, file())


@pytest.mark.parametrize("parts", [(), (MODEL,), (file(),), (MODEL, file()), (field("priority", b"1"), MODEL, file())])
def test_any_form_can_be_given_another_model(parts: tuple[bytes, ...]) -> None:
    kept = [part for part in parts if part == file()]
    assert read(*parts).encoded("served", KNOWN) == form(field("model", b"served"), *kept)


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        (FORM, BOUNDARY),
        ("multipart/form-data; charset=UTF-8; boundary=b", b"b"),
        ("multipart/form-data; boundary=b; charset=UTF-8", b"b"),
        ('multipart/form-data;a=b ; c=d;boundary="b,c" ;e=f', b"b,c"),
        ('Multipart/Form-Data;boundary="a:b?c"', b"a:b?c"),
        ("multipart/form-data ; Boundary=c ", b"c"),
    ],
)
def test_boundaries(header: str, boundary: bytes) -> None:
    assert boundary_of({b"content-type": header.encode()}) == boundary


@pytest.mark.parametrize(
    "parameters",
    [
        "", "; boundary=", "; boundary=" + "a" * 71, '; boundary="a', "; boundary=a b", "; boundary=a; boundary=b",
        "; boundary=a; Boundary*=b", "; boundary*=b; boundary=a", "; charset; boundary=a", '; charset="x"; boundary=a',
        "; charset=x boundary=a", "; charset=; boundary=a", "; boundary=a; x=y\r\nx: y", "; boundary=a\r\nx: y",
        '; boundary="a\\"b"', "; boundary=\xe9",
    ],
)  # fmt: skip
def test_malformed_boundaries_are_refused(parameters: str) -> None:
    with pytest.raises(BadRequestError, match="boundary"):
        boundary_of({b"content-type": f"multipart/form-data{parameters}".encode("latin-1")})


@pytest.mark.parametrize(
    ("header", "sent"),
    [
        ("Multipart/form-data; charset=UTF-8; boundary=a.b; x=y", "multipart/form-data; boundary=a.b"),
        ("multipart/form-data; boundary=a:b", 'multipart/form-data; boundary="a:b"'),
    ],
)
def test_a_backend_gets_the_boundary_alone(header: str, sent: str) -> None:
    boundary = boundary_of({b"content-type": header.encode()})
    found = read_form(form(MODEL, boundary=boundary), {b"content-type": header.encode()})
    assert found.content_type == sent.encode()
    assert boundary_of({b"content-type": found.content_type}) == boundary


@pytest.mark.parametrize("header", ["", "application/json", "multipart/mixed; boundary=a", "audio/wav"])
def test_only_forms_are_read(header: str) -> None:
    with pytest.raises(UnsupportedMediaTypeError, match="multipart/form-data"):
        boundary_of({b"content-type": header.encode()})


WHOLE = form(MODEL, file())
MALFORMED = {
    "an image as a file": (form(MODEL, file(b"\x89PNG\r\n\x1a\n" + AUDIO)), "file is an image; it must be audio: WAV"),
    "an image as another file": (form(MODEL, field("a", b"\xff\xd8\xff", '; filename="a.wav"')), "file is an image"),
    "a text as a file": (form(MODEL, field("file", b"GIF89a")), "file is an image"),
    "an empty file": (form(MODEL, file(b"")), "file is a file of an unknown kind"),
    "a file that begins in the boundary": (form(MODEL, file(b"RIFF")), "file is a file of an unknown kind"),
    "empty": (b"", "begin with its boundary"),
    "another boundary": (form(MODEL, boundary=b"abc"), "begin with its boundary"),
    "a preamble": (b"Hi\r\n" + WHOLE, "begin with its boundary"),
    "something after its end": (WHOLE + b"x", "end with its last boundary"),
    "no end": (WHOLE[:-4] + b"\r\n", "no headers"),
    "cut in the file": (WHOLE[:-20], "cut short"),
    "cut in a header": (WHOLE[:20], "no headers"),
    "text on the boundary's line": (b"--%b x\r\n%b" % (BOUNDARY, MODEL), "end with its last boundary"),
    "no headers": (form(b"\r\nwhisper"), "malformed header"),
    "no disposition": (form(b"content-type: text/plain\r\n\r\nx"), "needs the header"),
    "two dispositions": (form(b'content-disposition: form-data; name="a"\r\n' + MODEL), "two Content-Disposition"),
    "no name": (form(b"content-disposition: form-data; filename=y\r\n\r\nx"), "needs the header"),
    "another parameter": (form(field("a", b"x", "; x=y")), "malformed Content-Disposition"),
    "an escaped quote in a file's name": (
        form(field("a", b"x", '; filename="\\";name=model;b=\\""')),
        "malformed Content-D",
    ),
    "an escaped quote in another parameter": (
        form(b'content-disposition: form-data; x="\\";name=model;b=\\""; name="y"\r\n\r\nx'),
        "malformed Content-Disposition",
    ),
    "a file's name that ends in a backslash": (form(field("a", b"x", '; filename="C:\\"')), "malformed Content-D"),
    "two names": (form(b'content-disposition: form-data; name="a"; NAME="model"\r\n\r\nx'), "malformed Content-D"),
    "an encoded name": (
        form(b"content-disposition: form-data; name*=utf-8''model; name=a\r\n\r\nx"),
        "malformed Content-Disposition",
    ),
    "an escaped name": (form(b'content-disposition: form-data; name="mode\\l"\r\n\r\nx'), "needs the header"),
    "an open quote": (form(b'content-disposition: form-data; name="model\r\n\r\nx'), "malformed Content-Disposition"),
    "an attachment": (form(b"content-disposition: attachment; name=model\r\n\r\nx"), "malformed Content-Disposition"),
    "a folded header": (form(b"content-disposition: form-data;\r\n name=model\r\n\r\nx"), "malformed header"),
    "a lone line feed": (form(b"a: b\ncontent-disposition: form-data; name=model\r\n\r\nx"), "malformed header"),
    "long headers": (form(b"a: %b\r\n%b" % (b"x" * MAX_PART_HEAD, MODEL)), f"more than {MAX_PART_HEAD} bytes"),
    "many fields": (form(*[field("a", b"b")] * (MAX_PARTS + 1)), f"more than {MAX_PARTS} fields"),
    "two models": (form(MODEL, file(), field("model", b"other")), "2 fields named model"),
    "a model that is a file": (form(field("model", b"whisper", '; filename="a"')), "must be a text"),
    "a long model": (form(field("model", b"m" * 513)), "limit is 512"),
    "a model that is no text": (form(field("model", b"\xff")), "not UTF-8"),
}


@pytest.mark.parametrize(("raw", "words"), MALFORMED.values(), ids=MALFORMED)
def test_what_two_parsers_might_read_differently_is_refused(raw: bytes, words: str) -> None:
    assert words in refusal(raw)
