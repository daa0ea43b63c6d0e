"""vLLM through its dialect: what passes unchanged, what is translated, and what its errors mean."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.through import JSON, Through, run, text_of, user
from tests.support.chunks import VLLM
from tests.support.images import image
from tests.support.real_servers import CONTEXT, MODEL, Server
from xgen_proxy.dialects.error_mapping import read_error
from xgen_proxy.errors import BadRequestError, MissingCapabilityError, RequestRejectedError, UpstreamError

GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 8}
FRANCE = user("What is the capital of France?")


@pytest.fixture
def through(vllm_server: Server) -> Through:
    return Through("vllm", vllm_server.url)


def test_a_request_passes_as_it_came(vllm_server: Server) -> None:
    request = Through("vllm", vllm_server.url, alias=MODEL).request("chat", {"messages": FRANCE, "n": 2})
    assert VLLM.prepare(request) is request.raw


@pytest.mark.parametrize(
    ("endpoint", "body"), [("chat", {"messages": FRANCE}), ("completions", {"prompt": "One, two,"})]
)
def test_the_public_name(through: Through, endpoint: Any, body: dict[str, Any]) -> None:
    answer = through.ask(endpoint, **GREEDY, **body)
    assert answer["model"] == "public"
    chunks = through.stream(endpoint, **GREEDY, **body, stream_options={"include_usage": True})
    assert {chunk["model"] for chunk in chunks} == {"public"}
    choice = answer["choices"][0]
    assert text_of(chunks) == (choice["text"] if endpoint == "completions" else choice["message"]["content"])
    assert chunks[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]


def test_guided_choice_is_enforced(through: Through) -> None:
    answer = through.ask("chat", **GREEDY, messages=FRANCE, guided_choice=["apple", "pear"])
    assert answer["choices"][0]["message"]["content"] in ("apple", "pear")


def test_guided_json_is_enforced(through: Through) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = through.ask("chat", **{**GREEDY, "max_tokens": 60}, messages=FRANCE, guided_json=schema)
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["n"], int)


def test_max_completion_tokens_limits_completions_too(through: Through) -> None:
    for endpoint, body in ("chat", {"messages": FRANCE}), ("completions", {"prompt": "One, two,"}):
        answer = through.ask(endpoint, **body, temperature=0, max_completion_tokens=3)  # type: ignore[arg-type]
        assert answer["usage"]["completion_tokens"] == 3


def test_repeat_penalty_is_understood(through: Through) -> None:
    body = {"messages": user("Repeat after me: ha ha ha ha ha ha ha ha"), "temperature": 0, "max_tokens": 16}
    theirs = through.ask("chat", **body, repetition_penalty=2.0)
    assert through.ask("chat", **body, repeat_penalty=2.0)["choices"] == theirs["choices"]
    assert through.ask("chat", **body)["choices"] != theirs["choices"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}},
        "banana",
    ),
    "several greedy choices": ({"n": 2}, "n"),
    "malformed tools": ({"tools": [5]}, "tools"),
    "malformed messages": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [5]}]}, "dictionary"),
    "a stop of numbers": ({"stop": [5]}, "stop"),
    "functions": ({"functions": [{"name": "f", "parameters": {}}]}, "tools"),
}


def test_it_tells_which_media_it_does_not_read(through: Through) -> None:
    assert run(through.dialect.missing_media(MODEL, through.post)) == {"images", "audio", "video"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_image_is_what_the_engine_lacks(through: Through, stream: bool) -> None:
    ask = through.stream if stream else through.ask
    with pytest.raises(MissingCapabilityError, match="takes no images"):
        ask("chat", messages=user([image()]))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "word"), MISTAKES.values(), ids=MISTAKES)
def test_the_clients_mistakes_are_400(through: Through, fields: dict[str, Any], word: str, stream: bool) -> None:
    ask = through.stream if stream else through.ask
    with pytest.raises((BadRequestError, RequestRejectedError)) as refused:
        ask("chat", **{**GREEDY, "messages": FRANCE, **fields})
    assert refused.value.status == 400
    assert refused.value.type == "invalid_request_error"
    assert refused.value.code is None
    assert word in refused.value.message + str(refused.value.param)
    for leak in ("site-packages", ".py", "capital of France"):
        assert leak not in refused.value.message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_prompt_too_long(through: Through, endpoint: Any, stream: bool) -> None:
    text = "word " * (CONTEXT + 10)
    body: dict[str, Any] = {"messages": user(text)} if endpoint == "chat" else {"prompt": text}
    ask = through.stream if stream else through.ask
    with pytest.raises(RequestRejectedError) as refused:
        ask(endpoint, **body, max_tokens=3)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


def test_its_bare_errors(vllm_server: Server) -> None:
    """A model or a route that it does not have is our configuration's fault: another backend may have it."""
    for path, body in (("/v1/chat/completions", {"model": "nope", "messages": FRANCE}), ("/v1/nope", {})):
        answer = httpx.post(vllm_server.url + path, json=body, timeout=60)
        assert answer.status_code == 404
        assert isinstance(read_error(answer.status_code, answer.content), UpstreamError)
    answer = httpx.post(vllm_server.url + "/v1/chat/completions", json={"model": MODEL, "secret": "x"}, timeout=60)
    verdict = read_error(answer.status_code, answer.content)
    assert isinstance(verdict, RequestRejectedError)
    assert verdict.param == "messages"
    assert "secret" not in verdict.message
    broken = httpx.post(vllm_server.url + "/v1/chat/completions", content=b'"\xff', headers=JSON, timeout=60)
    assert isinstance(read_error(broken.status_code, broken.content), RequestRejectedError)
