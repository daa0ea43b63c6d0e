from __future__ import annotations

from tests.support.chunks import HI, make_request


def test_number_of_choices_and_path() -> None:
    assert make_request().choices == 1
    assert make_request(n=3).choices == 3
    assert make_request("completions", prompt=["a", "b"], n=2).choices == 4
    assert make_request("completions", prompt=[1, 2, 3]).choices == 1
    assert make_request("completions", prompt=["a"]).choices == 1
    assert make_request(messages=HI).path == "/v1/chat/completions"
