"""What reaches a backend of what a client sends, over real sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Talk
from tests.support.running_proxy import RunningProxy, backend, chat, post
from xgen_proxy.dialects.registry import DIALECTS

Start = Callable[..., RunningProxy]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
USE_F = {"type": "function", "function": {"name": "f"}}

# (dialect, what the client sends, what must reach the engine; None: no such field)
SENT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("vllm", {"priority": -(2**31), "request_id": "other", "kv_transfer_params": {"a": 1}},
     {"priority": None, "request_id": None, "kv_transfer_params": None}),
    ("llama-server", {"id_slot": 0}, {"id_slot": None}),
    ("openai", {"priority": 1, "id_slot": 0, "store": True}, {"priority": None, "id_slot": None, "store": True}),
    ("vllm", {"tools": [], "tool_choice": "auto"}, {"tools": None, "tool_choice": None}),
    ("openai", {"tools": [], "tool_choice": "none"}, {"tools": None, "tool_choice": None}),
    ("vllm", {"tools": TOOLS, "tool_choice": USE_F}, {"tools": TOOLS, "tool_choice": USE_F}),
    ("vllm", {"max_tokens": 100.0}, {"max_tokens": 100}),
    ("llama-cpp-python", {"max_tokens": 100.0}, {"max_tokens": 100}),
    ("vllm", {"max_tokens": -1}, {"max_tokens": None}),
    ("vllm", {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
     {"response_format": {"type": "json_schema", "json_schema": {"name": "schema", "schema": {"type": "object"}}}}),
    ("vllm", {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
     {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "fields", "reaches"), SENT)
def test_only_what_belongs_to_the_request_passes(
    start: Start, gpu: FakeUpstream, dialect: str, fields: dict[str, Any], reaches: dict[str, Any]
) -> None:
    proxy = start(backends={"only": backend(gpu, dialect=dialect, tools=True)})
    assert chat(proxy, **fields).status_code == 200
    talk = gpu.talks[0]  # llama-cpp-python is asked for counts afterwards
    assert {name: talk.json.get(name) for name in reaches} == reaches
    assert all(name in talk.json for name, value in reaches.items() if value is not None)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_beyond_the_context_is_no_long_prompt(start: Start, gpu: FakeUpstream, field: str) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    assert chat(proxy, **{field: 32_000}).status_code == 200
    assert 1900 < gpu.talks[0].json[field] < 2048, "the scripted backend reports a context of 2048"


def test_a_tool_result_may_be_empty(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": None},
    ]
    assert chat(proxy, messages=history).status_code == 200
    assert gpu.talks[0].json["messages"][-1] == {"role": "tool", "tool_call_id": "a", "content": ""}


HOSTILE: dict[str, dict[str, Any]] = {
    "stop strings": {"stop": ["x" * 8] * 20_000},
    "a stop string": {"stop": "x" * 1_000_000},
    "biases": {"logit_bias": {str(n): 1 for n in range(20_000)}},
    "a model": {"model": "x" * 1_000_000},
    "a user": {"user": "x" * 1_000_000},
    "a reasoning format": {"reasoning_format": "'loc': [" * 6_000},
    "a pattern": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a" * 50_000}}}},
    "a function's name": {"tools": [{"type": "function", "function": {"name": "f" * 1_000_000}}]},
    "a role": {"messages": [{"role": "x" * 1_000_000, "content": "Hi"}]},
    "an urgency": {"urgency": "x" * 1_000_000},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_too_long_is_refused_in_brief(start: Start, gpu: FakeUpstream, dialect: str) -> None:
    proxy = start(backends={"only": backend(gpu, dialect=dialect, tools=True)})
    for name, fields in HOSTILE.items():
        answer = chat(proxy, stream=True, **fields) if "model" not in fields else chat_with(proxy, fields)
        assert answer.status_code == 400, name
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert len(answer.content) < 1000, name
    assert gpu.talks == []


def chat_with(proxy: RunningProxy, fields: dict[str, Any]) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return post(f"{proxy.url}/v1/chat/completions", json=body)


def test_too_many_prompts_are_refused(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    answer = post(f"{proxy.url}/v1/completions", json={"model": "m", "prompt": ["a"] * 129})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert gpu.talks == []


async def embedded(talk: Talk) -> None:
    vectors = [{"object": "embedding", "index": n, "embedding": [0.5]} for n in range(len(talk.json["input"]))]
    await talk.answer(200, {"object": "list", "data": vectors, "model": "m", "usage": {}})


def test_each_text_of_an_embeddings_batch_meets_the_context_by_itself(start: Start, cpu: FakeUpstream) -> None:
    cpu.default = embedded
    proxy = start(backends={"emb": backend(cpu, dialect="llama-server", embeddings=True, context=512)})
    body = {"model": "m", "input": ["word " * 200] * 100, "task_type": "RETRIEVAL_QUERY", "session_id": "s"}
    answer = post(f"{proxy.url}/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    [talk] = cpu.talks
    assert talk.json["task_type"] == "RETRIEVAL_QUERY"
    assert "session_id" not in talk.json
    too_long = post(f"{proxy.url}/v1/embeddings", json={"model": "m", "input": ["word " * 2000]})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
