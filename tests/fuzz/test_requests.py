"""Any request body becomes a Call that each engine takes or refuses, or a ProxyError with a 4xx."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from tests.support.fuzzing import examples, mutated, mutated_json, reported
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.errors import ProxyError, UpstreamError
from xgen_proxy.request.call import Call, Origin, parse_call
from xgen_proxy.request.features import Endpoint
from xgen_proxy.request.json_body import read_json
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.request.opaque.parsing import parse_opaque

SCHEMA = {
    "$defs": {"a": {"type": "string"}},
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/a"}, "y": {"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}},
    "required": ["x"],
    "additionalProperties": False,
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": None, "tool_calls": [CALLED], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "stream": True,
    "stream_options": {"include_usage": True},
}
OPTIONS: dict[str, Any] = {
    "max_tokens": 5, "max_completion_tokens": 5, "temperature": 0.5, "top_p": 1, "n": 2, "best_of": 2, "stop": ["a"],
    "seed": 1, "logprobs": True, "top_logprobs": 3, "logit_bias": {"5": 1}, "user": "u", "top_k": 5, "min_p": 0.1,
    "presence_penalty": 1, "repeat_penalty": 1.1, "repetition_penalty": 1.1, "grammar": "root ::= [a-z]",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
    "json_schema": SCHEMA, "guided_json": SCHEMA, "guided_choice": ["a"], "structured_outputs": {"regex": "a+"},
    "functions": [FUNCTION], "function_call": {"name": "f"}, "parallel_tool_calls": True, "priority": 1,
    "backend": "auto", "urgency": "high", "task_type": "code", "fallback": "none", "continuation": "none",
    "session_id": "s", "prompt_cache_key": "k", "repeat_last_n": 64, "n_probs": 2, "suffix": "x", "echo": True,
    "chat_template_kwargs": {"enable_thinking": False}, "encoding_format": "base64", "dimensions": 64,
    "request_id": "r", "kv_transfer_params": {}, "min_tokens": 1, "reasoning_effort": "low", "metadata": {"a": "b"},
}  # fmt: skip
BODIES: list[tuple[Endpoint, dict[str, Any]]] = [
    ("chat", CHAT),
    ("chat", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("completions", {"model": "m", "prompt": "One, two,", "stream": True}),
    ("completions", {"model": "m", "prompt": ["One", "Two"], "logprobs": 2}),
    ("completions", {"model": "m", "prompt": [[1, 2], [3]]}),
    ("embeddings", {"model": "m", "input": ["a", "b"], "encoding_format": "float"}),
    ("embeddings", {"model": "m", "input": [1, 2, 3]}),
]
OPAQUE_BODIES: list[tuple[Endpoint, dict[str, Any]]] = [
    ("rerank", {"model": "m", "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
    ("score", {"model": "m", "text_1": ["a"], "text_2": "b"}),
    ("classify", {"model": "m", "input": ["a"]}),
    ("tokenize", {"model": "m", "prompt": "a", "add_special_tokens": False}),
    ("tokenize", {"model": "m", "content": "a", "add_special": True}),
    ("tokenize", {"model": "m", "messages": [{"role": "user", "content": "a"}]}),
    ("detokenize", {"model": "m", "tokens": [1, 2]}),
]
HEADERS = [{}, {b"content-type": b"application/json; charset=utf-8"}, {b"x-urgency": b"low", b"traceparent": b"00-x"}]


def body(rng: random.Random, bodies: list[tuple[Endpoint, dict[str, Any]]]) -> tuple[Endpoint, bytes]:
    endpoint, least = rng.choice(bodies)
    whole = {**least, **{name: OPTIONS[name] for name in rng.sample(list(OPTIONS), rng.randrange(4))}}
    if rng.random() < 0.8:
        whole = mutated_json(rng, whole)
    raw = orjson.dumps(whole)
    return endpoint, mutated(rng, raw) if rng.random() < 0.2 else raw


def parsed(endpoint: Endpoint, raw: bytes, headers: dict[bytes, bytes]) -> Call:
    limits = Limits()
    origin, found = Origin("id", headers), read_json(raw, headers, limits)
    if endpoint in OPAQUE:
        return parse_opaque(origin, endpoint, raw, found, lambda: "m")
    return parse_call(
        origin,
        endpoint,
        raw,
        found,
        limits=limits,
        continuation=True,
        default_model=lambda: "m",
    )


def assert_refusal(error: ProxyError) -> None:
    assert 400 <= error.status < 500
    assert orjson.loads(error.body())["error"]["message"]
    assert len(error.body()) < 2000


@pytest.mark.parametrize("bodies", [BODIES, OPAQUE_BODIES], ids=["chats", "opaque"])
def test_any_body_is_a_call_or_a_refusal(bodies: list[tuple[Endpoint, dict[str, Any]]]) -> None:
    for rng in examples():
        endpoint, raw = body(rng, bodies)
        with reported((endpoint, raw)):
            try:
                call = parsed(endpoint, raw, rng.choice(HEADERS))
            except ProxyError as error:
                assert_refusal(error)
                continue
            for dialect in DIALECTS.values():
                with reported(dialect.name):
                    request = BackendRequest(call.features, call.body, call.raw, call.model, "served", 2048)
                    try:
                        assert isinstance(orjson.loads(dialect.prepare(request)), dict)
                        assert isinstance(dialect.asks_for_stream(request), bool)
                        assert request.opaque or request.choices >= 1
                    except ProxyError as error:
                        assert_refusal(error)
                    except UpstreamError:
                        pass  # this engine cannot: the next one is asked
