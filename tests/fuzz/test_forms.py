"""Any bytes are a form of which each engine gets the model that was read, or a refusal with a 4xx."""

from __future__ import annotations

import random

from tests.fuzz.test_requests import assert_refusal
from tests.support.forms import AUDIO, BOUNDARY, FORM, field, file, form
from tests.support.fuzzing import examples, mutated, reported
from xgen_proxy.errors import ProxyError
from xgen_proxy.request.opaque.multipart import Form, read_form

PARTS = [
    field("model", b"whisper"), field("stream", b"true"), field("language", b"en"), field("priority", b"1"), file(),
    b"content-type: text/plain\r\nContent-Disposition: form-data; name=prompt\r\n\r\nHi", field("model", b"other"),
    field("a", AUDIO, "; filename*=utf-8''c"),
]  # fmt: skip
QUOTED = f'multipart/form-data; boundary="{BOUNDARY.decode()}"'
HEADERS = [FORM, FORM, FORM + "; charset=UTF-8", QUOTED, "multipart/form-data", "text/plain"]
KNOWN = frozenset({b"model", b"stream", b"language", b"file", b"prompt"})


def body(rng: random.Random) -> bytes:
    raw = form(*[rng.choice(PARTS) for _ in range(rng.randrange(5))])
    if rng.random() < 0.3:
        at = rng.randrange(len(raw) + 1)
        piece = rng.choice(
            [b"--" + BOUNDARY, b"\r\n--" + BOUNDARY, b"--", BOUNDARY, b'; name="model"', b"\\", b'"', b'\\"']
        )
        raw = raw[:at] + piece + raw[at:]
    return mutated(rng, raw) if rng.random() < 0.6 else raw


def read(raw: bytes, header: str) -> Form:
    return read_form(raw, {b"content-type": header.encode()})


def test_any_bytes_are_a_form_or_a_refusal() -> None:
    for rng in examples():
        raw, header = body(rng), rng.choice(HEADERS)
        with reported((header, raw)):
            try:
                found = read(raw, header)
            except ProxyError as error:
                assert_refusal(error)
                continue
            assert sum(part.name == b"model" for part in found.parts) <= 1
            sent = read(found.encoded("served", KNOWN), found.content_type.decode())
            assert sent.fields["model"] == "served"
            kept = [found.raw[part.start : part.end] for part in found.parts if part.name in KNOWN - {b"model"}]
            assert [sent.raw[part.start : part.end] for part in sent.parts[1:]] == kept
