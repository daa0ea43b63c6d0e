from __future__ import annotations

from tests.support.chunks import HI, make_request
from tests.support.requests import make_opaque_request


def test_number_of_choices_and_path() -> None:
    assert make_request().choices == 1
    assert make_request(n=3).choices == 3
    assert make_request("completions", prompt=["a", "b"], n=2).choices == 4
    assert make_request("completions", prompt=[1, 2, 3]).choices == 1
    assert make_request("completions", prompt=["a"]).choices == 1
    assert make_request(messages=HI).path == "/v1/chat/completions"


def test_an_opaque_request_is_named_by_its_capability() -> None:
    assert make_request().opaque is None
    request = make_opaque_request("detokenize", tokens=[1])
    assert (request.opaque, request.path, request.choices) == ("tokenize", "/detokenize", 1)
