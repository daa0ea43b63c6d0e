"""llama-cpp-python through its dialect: nothing kills it, mistakes are 400 in words, and what it can do it does."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.e2e.through import Through, text_of, user
from tests.support.proxied_backend import NEVER_ENDING
from tests.support.real_servers import CONTEXT, MODEL, Proxy, Server
from xgen_proxy.dialects.error_mapping import read_error
from xgen_proxy.errors import BadRequestError, ProxyError, RequestRejectedError, UpstreamError

GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 4}
FRANCE = user("What is the capital of France?")


@pytest.fixture
def through(llama_cpp_python: Server) -> Through:
    return Through("llama-cpp-python", llama_cpp_python.url)


def asks(through: Through, stream: bool) -> Callable[..., Any]:
    return through.stream if stream else through.ask


def schema(body: Any) -> dict[str, Any]:
    return {
        "messages": FRANCE,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": body}},
    }


def tool(parameters: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters}
    choice = {"type": "function", "function": {"name": "f"}}
    return {"messages": FRANCE, "tools": [{"type": "function", "function": function}], "tool_choice": choice}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": FRANCE, **fields}


# Each of these killed the process, or came out as something else than was asked, when it was sent to it bare.
SCHEMAS: dict[str, Any] = {
    "a quote": {"enum": ['a"b']},
    "a backslash": {"const": "a\\b"},
    "a control character": {"const": "a\bb"},
    "an emoji": {"enum": ["😀"]},
    "a property with a quote": {"type": "object", "properties": {'"': {}}},
    "a property without a name": {"type": "object", "properties": {"": {"type": "string"}}},
    "no enum": {"enum": []},
    "no anyOf": {"anyOf": []},
    "no type": {"type": []},
    "an unknown type": {"type": "banana"},
    "a pattern": {"type": "string", "pattern": "^\\d+$"},
    "a long text": {"type": "string", "maxLength": 5000},
    "a long list": {"type": "array", "items": {"type": "string"}, "minItems": 100_000},
    "a range that is none": {"type": "array", "items": {}, "minItems": 3, "maxItems": 2},
    "a number's range": {"type": "integer", "minimum": 3},
    "recursion": {
        "$ref": "#/$defs/node",
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    },
    "a dangling reference": {"$ref": "#/$defs/nope"},
    "a reference elsewhere": {"$ref": "https://example.com/schema"},
    "a list": [1],
    "a text": "x",
}

MISTAKES: dict[str, dict[str, Any]] = {
    **{f"schema with {name}": schema(body) for name, body in SCHEMAS.items()},
    **{f"tool with {name}": tool(body) for name, body in SCHEMAS.items()},
    "bad grammar": chat(grammar="root ::= ((("),
    "any grammar": chat(grammar='root ::= "yes"'),
    "structured_outputs": chat(structured_outputs={"choice": ["a"]}),
    "n": chat(n=2),
    "stop of numbers": chat(stop=[5]),
    "logit_bias by word": chat(logit_bias={"Paris": 5}),
    "logit_bias below 0": chat(logit_bias={"-1": 5}),
    "logit_bias of words": chat(logit_bias={"5": "x"}),
    "min_p too high": chat(min_p=2),
    "repeat_penalty of 0": chat(repeat_penalty=0),
    "a tool that is none": chat(tools=[5], tool_choice={"type": "function", "function": {"name": "f"}}),
    "a choice that is no tool": {**tool({}), "tool_choice": {"type": "function", "function": {"name": "g"}}},
    "a tool message without an id": chat(messages=[{"role": "tool", "content": "x"}]),
    "a function message without a name": chat(messages=[{"role": "function", "content": "x"}]),
    "malformed tool calls": chat(messages=[{"role": "assistant", "content": "", "tool_calls": [5]}]),
    "mirostat": chat(mirostat_mode=7),
}  # fmt: skip

COMPLETION_MISTAKES: dict[str, dict[str, Any]] = {
    "an empty prompt": {"prompt": ""},
    "two prompts": {"prompt": ["a", "b"]},
    "token ids": {"prompt": [1, 2]},
    "suffix": {"prompt": "a", "suffix": "b"},
    "response_format": {"prompt": "a", "response_format": {"type": "json_object"}},
    "too many logprobs": {"prompt": "a", "logprobs": 1000},
}

ALL_MISTAKES = [("chat", name, body) for name, body in MISTAKES.items()]
ALL_MISTAKES += [("completions", name, body) for name, body in COMPLETION_MISTAKES.items()]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [(endpoint, body) for endpoint, _, body in ALL_MISTAKES],
    ids=[name for _, name, _ in ALL_MISTAKES],
)
def test_mistakes_never_reach_it(through: Through, endpoint: Any, body: dict[str, Any]) -> None:
    for stream in (False, True):
        with pytest.raises(BadRequestError) as refused:
            asks(through, stream)(endpoint, **{**GREEDY, **body})
        assert refused.value.status == 400
        assert refused.value.param
    assert through.ask("chat", **GREEDY, messages=FRANCE)["choices"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_prompt_too_long(through: Through, endpoint: Any, stream: bool) -> None:
    text = "word " * (CONTEXT + 10)
    body: dict[str, Any] = {"messages": user(text)} if endpoint == "chat" else {"prompt": text}
    with pytest.raises(RequestRejectedError) as refused:
        asks(through, stream)(endpoint, **body, max_tokens=3)
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert str(CONTEXT) in refused.value.message


WORKS: dict[str, dict[str, Any]] = {
    "max_completion_tokens": chat(max_completion_tokens=2, max_tokens=None),
    "max_completion_tokens wins": chat(max_completion_tokens=2, max_tokens=9),
    "developer": chat(messages=[{"role": "developer", "content": "Be brief."}, *FRANCE], max_tokens=2),
    "parts": chat(messages=user([{"type": "text", "text": "Hi"}]), max_tokens=2),
    "nulls": chat(stop=None, n=None, tools=None, seed=None, top_p=None, logit_bias=None, max_tokens=2),
    "unknown fields": chat(store=True, metadata={"a": "b"}, user=5, parallel_tool_calls=False, max_tokens=2),
    "top_k of -1": chat(top_k=-1, max_tokens=2),
    "repetition_penalty": chat(repetition_penalty=1.2, max_tokens=2),
    "tool_choice none": {**tool({"type": "banana"}), "tool_choice": "none", "max_tokens": 2},
    "empty stop": chat(stop="", max_tokens=2),
    "extreme seed": chat(seed=-(2**63), max_tokens=2),
    "unlikely token": chat(logit_bias={"9999999": 5}, max_tokens=2),
}


@pytest.mark.parametrize("body", WORKS.values(), ids=WORKS)
def test_what_it_takes_after_a_change(through: Through, body: dict[str, Any]) -> None:
    body = {**GREEDY, **body}
    answer = through.ask("chat", **body)
    assert answer["usage"]["completion_tokens"] == 2
    assert text_of(through.stream("chat", **body)) == answer["choices"][0]["message"]["content"]


def test_greedy_means_the_same_as_elsewhere(through: Through, llama_cpp_python: Server) -> None:
    """Its own default would be a repeat_penalty of 1.1."""
    repeat = {"messages": user("Repeat after me: ha ha ha ha ha ha ha ha"), "temperature": 0, "max_tokens": 12}
    ask = {**repeat, "model": MODEL, "repeat_penalty": 1.0}
    own = httpx.post(llama_cpp_python.url + "/v1/chat/completions", json=ask, timeout=60).json()
    assert through.ask("chat", **repeat)["choices"][0]["message"]["content"] == own["choices"][0]["message"]["content"]


NESTED = {
    "$defs": {
        "tag": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}
    },
    "type": "object",
    "properties": {
        "kind": {"enum": ["big", "small"]},
        "count": {"type": ["integer", "null"]},
        "tag": {"$ref": "#/$defs/tag", "description": "beside the reference"},
        "pair": {"prefixItems": [{"type": "boolean"}, {"const": "x"}], "type": "array"},
    },
    "required": ["kind", "count", "tag", "pair"],
    "additionalProperties": False,
}


def assert_nested(value: Any) -> None:
    assert list(value) == ["kind", "count", "tag", "pair"]
    assert value["kind"] in ("big", "small")
    assert value["count"] is None or isinstance(value["count"], int)
    assert len(value["tag"]["name"]) <= 8
    assert isinstance(value["pair"][0], bool)
    assert value["pair"][1] == "x"


def test_a_schema_is_enforced(through: Through) -> None:
    answer = through.ask("chat", **{**GREEDY, **schema(NESTED), "max_tokens": 120})
    assert_nested(json.loads(answer["choices"][0]["message"]["content"]))


def test_a_forced_tool_is_called_with_its_schema(through: Through) -> None:
    body = {**GREEDY, **tool(NESTED), "max_tokens": 120}
    call = through.ask("chat", **body)["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "f"
    assert_nested(json.loads(call["function"]["arguments"]))
    deltas = [choice["delta"] for chunk in through.stream("chat", **body) for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["function"]["name"] for call in calls if "name" in call["function"]] == ["f"]
    assert len([call for call in calls if "id" in call]) == 1
    assert_nested(json.loads("".join(call["function"]["arguments"] for call in calls)))


def test_characters_of_several_tokens_survive_logprobs(through: Through) -> None:
    body = {"messages": user("Repeat exactly: 😀😀😀 안녕"), "temperature": 0, "max_tokens": 10}
    plain = through.ask("chat", **body)["choices"][0]["message"]["content"]
    chunks = through.stream("chat", **body, logprobs=True, stream_options={"include_usage": True})
    assert text_of(chunks) == plain
    assert chunks[0]["choices"][0]["logprobs"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] >= 10


def test_embeddings_without_a_model_for_it(through: Through) -> None:
    with pytest.raises(UpstreamError):
        through.ask("embeddings", input="Hi")


def test_its_bare_errors(llama_cpp_python: Server) -> None:
    """What would come back if a mistake slipped through: no path, no prompt, and not taken for a broken backend."""
    for body in ({"messages": FRANCE, "top_p": 2}, {"messages": FRANCE, "temperature": "hot secret"}):
        answer = httpx.post(llama_cpp_python.url + "/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 500
        verdict = read_error(answer.status_code, answer.content)
        assert isinstance(verdict, RequestRejectedError)
        assert verdict.status == 400
        for leak in ("/", "secret", ".py"):
            assert leak not in verdict.message
    answer = httpx.post(llama_cpp_python.url + "/v1/nope", json={}, timeout=60)
    assert isinstance(read_error(answer.status_code, answer.content), UpstreamError)


@pytest.fixture(scope="module")
def proxied(llama_cpp_python: Server, start_proxy: Callable[..., Proxy]) -> Proxy:
    proxy = start_proxy("--llama-cpp", llama_cpp_python.url)
    proxy.wait_ready()
    return proxy


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_the_generation(proxied: Proxy, stream: bool) -> None:
    """Found by the proxy, which closes its connection then: 2,000 tokens more would take half a minute at best."""
    body = {"messages": user("Count."), "stop": [" "], "temperature": 0, **NEVER_ENDING, "stream": stream}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    began = time.monotonic()
    answer = httpx.post(proxied.url + "/v1/chat/completions", json={**body, **options}, timeout=120)
    assert time.monotonic() - began < 20
    assert answer.status_code == 200
    assert '"finish_reason":"stop"' in answer.text
    assert '"completion_tokens":' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n") == stream


def test_what_it_can_only_do_whole_is_told_as_a_stream(proxied: Proxy) -> None:
    body = {"prompt": "One, two,", "echo": True, "temperature": 0, "max_tokens": 4, "stream": True}
    answer = httpx.post(proxied.url + "/v1/completions", json=body, timeout=120)
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *_, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert json.loads(first)["choices"][0]["text"].startswith("One, two,")
    assert done == "[DONE]"


VALUES: list[Any] = [
    None, True, 0, -1, 1, 2, 2**31, 2**63 - 1, 1.5, 1e308, "", "a", "\x00", "😀", '"\\', "root ::= (((",
    [], [[]], [None],
    [""], ["a"], [5], {}, {"a": 1}, {"type": "banana"}, {"$ref": "#"}, {"enum": ['"']}, {"pattern": "^\\d$"},
    {"type": "json_object", "schema": {"enum": ['"']}}, {"type": "function", "function": {"name": "f"}},
    [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["\b"]}}}], {"name": "f"},
    [{"role": "user", "content": "a"}], [{"role": "assistant", "content": None, "tool_calls": [{}]}],
]  # fmt: skip
FIELDS = [
    "messages", "prompt", "max_tokens", "min_tokens", "temperature", "top_p", "min_p", "top_k", "stop", "logprobs",
    "top_logprobs", "logit_bias", "logit_bias_type", "seed", "n", "best_of", "echo", "suffix", "user", "grammar",
    "tools", "tool_choice", "functions", "function_call", "response_format", "repeat_penalty", "repetition_penalty",
    "mirostat_mode", "mirostat_tau", "mirostat_eta", "presence_penalty", "frequency_penalty",
    "max_completion_tokens", "model",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_hostile_requests_never_kill_it(through: Through, llama_cpp_python: Server, seed: int) -> None:
    choose = random.Random(seed)
    process = llama_cpp_python.process
    assert process is not None
    for _ in range(150):
        endpoint = choose.choice(["chat", "completions"])
        body: dict[str, Any] = {"messages": FRANCE} if endpoint == "chat" else {"prompt": "One"}
        body.update({choose.choice(FIELDS): choose.choice(VALUES) for _ in range(choose.randint(1, 3))})
        if body.get("max_tokens") != body.get("max_completion_tokens") or not body.get("max_tokens"):
            body["max_tokens"] = 2
            body.pop("max_completion_tokens", None)
        try:
            asks(through, choose.random() < 0.5)(endpoint, **body)
        except ProxyError as error:
            assert error.status == 400, (body, error.message)  # noqa: PT017
        assert process.poll() is None, body
    assert through.ask("chat", **GREEDY, messages=FRANCE)["choices"]
