"""llama-server through its dialect: whole answers are its own, and each of its hazards is dealt with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.through import Through, text_of, user
from tests.support.images import image
from tests.support.real_servers import CONTEXT, Server
from xgen_proxy.errors import BadRequestError, MissingCapabilityError, RequestRejectedError

GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 12}
FRANCE = user("What is the capital of France?")
NUMBER = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}

# (endpoint, request)
SAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": ("chat", {"messages": FRANCE}),
    "korean": ("chat", {"messages": user("안녕하세요!")}),
    "emoji": ("chat", {"messages": user("Answer with emoji only: 😀🎉🚀")}),
    "cut": ("chat", {"messages": FRANCE, "max_tokens": 2}),
    "stop": ("chat", {"messages": FRANCE, "stop": ["Paris"]}),
    "max_completion_tokens": ("chat", {"messages": FRANCE, "max_tokens": None, "max_completion_tokens": 3}),
    "json_schema": ("chat", {"messages": user("A number"), "response_format": NUMBER}),
    "logprobs": ("chat", {"messages": FRANCE, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}),
    "grammar": ("chat", {"messages": FRANCE, "grammar": 'root ::= "yes" | "no"'}),
    "tool conversation": (
        "chat",
        {
            "messages": [
                *user("Weather?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "a", "content": "sunny"},
            ]
        },
    ),
    "developer, parts, nulls": (
        "chat",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                *user([{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]),
            ],
            "stop": None,
            "tools": None,
        },
    ),
    "completion": ("completions", {"prompt": "One, two, three,"}),
    "token ids": ("completions", {"prompt": [1, 2, 3]}),
    "completion, json": ("completions", {"prompt": "A number:", "response_format": NUMBER}),
}

FLEETING = {"id", "created", "model", "timings", "prompt_tokens_details"}


def steady(answer: Any) -> Any:
    """Without what differs in each answer."""
    if isinstance(answer, dict):
        return {key: steady(value) for key, value in answer.items() if key not in FLEETING}
    return [steady(each) for each in answer] if isinstance(answer, list) else answer


def nearly(answer: Any) -> Any:
    """Batching moves a logprob a little."""
    if isinstance(answer, dict):
        return {key: nearly(value) for key, value in answer.items()}
    if isinstance(answer, list):
        return [nearly(each) for each in answer]
    return pytest.approx(answer, abs=0.05) if isinstance(answer, float) else answer


@pytest.fixture
def through(llama_server: Server) -> Through:
    return Through("llama-server", llama_server.url)


@pytest.mark.parametrize(("endpoint", "body"), SAME.values(), ids=SAME)
def test_answers_are_its_own(through: Through, endpoint: Any, body: dict[str, Any]) -> None:
    body = {**GREEDY, **body}
    through.own(endpoint, **{**body, "max_tokens": 1})  # all begin with the prompt in its cache
    own = through.own(endpoint, **body).json()
    whole = through.ask(endpoint, **body)
    assert steady(whole) == nearly(steady(own))
    assert set(whole) == set(own)
    assert whole["model"] == "public"
    assert whole["usage"]["prompt_tokens_details"].keys() == own["usage"]["prompt_tokens_details"].keys()

    chunks = through.stream(endpoint, **body, stream_options={"include_usage": True})
    choice = own["choices"][0]
    assert text_of(chunks) == (choice["text"] if endpoint == "completions" else choice["message"]["content"])
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert [usage["completion_tokens"] for usage in usages] == [own["usage"]["completion_tokens"]]
    assert {chunk["model"] for chunk in chunks} == {"public"}
    assert len({chunk["created"] for chunk in chunks}) == 1
    if endpoint == "chat":
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_usage_of_several_choices_is_their_sum(through: Through) -> None:
    body = {**GREEDY, "messages": FRANCE, "n": 2, "max_tokens": 3}
    whole = through.ask("chat", **body)
    one = through.ask("chat", **{**body, "n": 1})["usage"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == 6
    assert whole["usage"]["total_tokens"] == one["prompt_tokens"] + 6
    chunks = through.stream("chat", **body, stream_options={"include_usage": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")] == [6]
    assert chunks[-1]["choices"] == []
    roles = [choice["index"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert sorted(roles) == [0, 1]


def test_several_prompts(through: Through) -> None:
    body = {**GREEDY, "prompt": ["One, two,", "A, b,"], "max_tokens": 3}
    whole = through.ask("completions", **body)
    alone = [through.ask("completions", **{**body, "prompt": prompt}) for prompt in body["prompt"]]
    assert [choice["text"] for choice in whole["choices"]] == [each["choices"][0]["text"] for each in alone]
    assert whole["usage"]["prompt_tokens"] == sum(each["usage"]["prompt_tokens"] for each in alone)
    assert whole["usage"]["completion_tokens"] == 6


def test_logprobs_of_completions_have_the_legacy_shape(through: Through) -> None:
    body = {**GREEDY, "prompt": "One, two,", "logprobs": 2, "max_tokens": 3}
    logprobs = through.ask("completions", **body)["choices"][0]["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 3
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    chunks = through.stream("completions", **body)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0].get("logprobs")]
    assert [token for piece in pieces for token in piece["tokens"]] == logprobs["tokens"]
    assert [offset for piece in pieces for offset in piece["text_offset"]] == logprobs["text_offset"]


def test_a_completion_without_max_tokens_has_16(through: Through) -> None:
    body = {"prompt": "Once upon a time", "temperature": 0, "seed": 1, "logit_bias": {"0": -100, "2": -100}}
    assert through.ask("completions", **body)["usage"]["completion_tokens"] == 16
    limited = through.ask("completions", **body, max_completion_tokens=3)
    assert limited["usage"]["completion_tokens"] == 3


def test_json_schema_is_enforced_on_completions(through: Through) -> None:
    answer = through.ask("completions", **GREEDY, prompt="A number:", response_format=NUMBER)
    assert isinstance(json.loads(answer["choices"][0]["text"]), int)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "bad grammar": ("chat", {"messages": FRANCE, "grammar": "root ::= ((("}, "grammar"),
    "bad schema": (
        "chat",
        {"messages": FRANCE, "response_format": {"type": "json_object", "schema": {"type": "banana"}}},
        "banana",
    ),
    "malformed tools": ("chat", {"messages": FRANCE, "tools": [5]}, "tool"),
    "malformed tool calls": (
        "chat",
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [5]}]},
        "tool call",
    ),
    "wrong type": ("chat", {"messages": FRANCE, "cache_prompt": "x"}, "cache_prompt"),
    "unknown reasoning format": ("chat", {"messages": FRANCE, "reasoning_format": "zzz"}, "reasoning"),
    "more choices than slots": ("chat", {"messages": FRANCE, "n": 20}, "'n'"),
    "functions": ("chat", {"messages": FRANCE, "functions": [{"name": "f", "parameters": {}}]}, "tools"),
    "memory": ("chat", {"messages": FRANCE, "repeat_last_n": 10**9}, "repeat_last_n"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_image_is_what_the_engine_lacks(through: Through, stream: bool) -> None:
    ask = through.stream if stream else through.ask
    with pytest.raises(MissingCapabilityError, match="--mmproj"):
        ask("chat", messages=user([image()]))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("endpoint", "body", "word"), REFUSED.values(), ids=REFUSED)
def test_the_clients_mistakes_are_400(
    through: Through, endpoint: Any, body: dict[str, Any], word: str, stream: bool
) -> None:
    ask = through.stream if stream else through.ask
    with pytest.raises((BadRequestError, RequestRejectedError)) as refused:
        ask(endpoint, **{**GREEDY, **body})
    assert refused.value.status == 400
    assert word in refused.value.message
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_too_long(through: Through, stream: bool) -> None:
    ask = through.stream if stream else through.ask
    with pytest.raises(RequestRejectedError) as refused:
        ask("chat", messages=user("word " * (CONTEXT + 10)), max_tokens=3)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
