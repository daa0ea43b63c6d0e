"""What each engine is asked, and how its answer is read."""

from __future__ import annotations

import math

import httpx
import pytest

from tests.support.scripted_engines import SCRIPTS, client, engine, llama_cpp_python
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.served.engines import VLLM, Engine, LlamaCppPython, LlamaServer, ask, connect, text_of


@pytest.mark.parametrize("kind", SCRIPTS)
def test_each_tells_tokens_and_distributions(kind: type[Engine]) -> None:
    asked = engine(kind)
    tokens = asked.tokens("1 2 3 4")
    assert tokens == [1, 2, 3, 4]
    ticks: list[None] = []
    found = asked.distributions("1 2 3 4", tokens, 20, lambda: ticks.append(None))
    assert len(found) == len(ticks) == 3
    assert found[1] is not None
    assert [(each.text, each.logprob) for each in found[1]] == [("t1", math.log(0.5)), ("t2", math.log(0.25))]
    assert asked.details()["version"]


def test_llama_cpp_python_tells_no_ids_and_nothing_of_the_first_position() -> None:
    first, second, _ = engine(LlamaCppPython).distributions("1 2 3 4", [1, 2, 3, 4], 20, lambda: None)
    assert first is None
    assert second is not None
    assert {each.id for each in second} == {None}


def test_positions_that_do_not_match_the_tokens_are_an_error() -> None:
    asked = engine(LlamaCppPython, lambda path, body: llama_cpp_python(path, {**body, "prompt": "1 2 3 4 5 6"}))
    with pytest.raises(ModelError, match="gave 7 positions for 3 tokens"):
        asked.distributions("1 2 3", [1, 2, 3], 20, lambda: None)


def test_a_part_of_a_character_has_no_text() -> None:
    assert text_of([0xEC, 0x9A]) == ""
    assert text_of("요".encode()) == "요"


@pytest.mark.parametrize("kind", [VLLM, LlamaServer, LlamaCppPython])
def test_the_engine_is_recognised(kind: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    made = client(SCRIPTS[kind])
    monkeypatch.setattr(httpx, "Client", lambda **_: made)
    found = connect("http://engine:8000/", None, None)
    assert type(found) is kind
    assert (found.url, found.model) == ("http://engine:8000", "m")
    with pytest.raises(ModelError, match="does not serve other; it serves m"):
        connect("http://engine:8000", "other", None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(401, json={}), "asks for a key: pass --engine-key"),
        (httpx.Response(200, text="<html>"), "answered 200 without JSON"),
        (httpx.Response(400, json={"error": "greater than max allowed: 20"}), "answered 400: .*max allowed: 20"),
    ],
)
def test_errors_say_what_to_do(answer: httpx.Response, message: str) -> None:
    broken = httpx.Client(transport=httpx.MockTransport(lambda _: answer))
    with pytest.raises(ModelError, match=message):
        ask(broken, "http://engine/tokenize", {})


def test_another_server_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    other = client(lambda path, body: {"data": [{"id": "m", "owned_by": "xgen-proxy"}]})
    monkeypatch.setattr(httpx, "Client", lambda **_: other)
    with pytest.raises(ModelError, match="is not an engine that can be compared"):
        connect("http://proxy:8080", None, None)
