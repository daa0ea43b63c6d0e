"""What a schema allows is what request/fields.py accepts, and what it forbids is refused."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from xgen_proxy.api.description.request_schemas import (
    HINT_MEANINGS,
    MEANINGS,
    chat_request,
    checked_fields,
    completion_request,
    embeddings_request,
    generate_request,
    hints,
    message,
)
from xgen_proxy.api.generate import GenerateRequest, parse_generate
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import HINTS, Endpoint, Json
from xgen_proxy.request.fields import CHECKED, LISTS, RANGES, check_fields
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.parsing import parse_features

LEAST: dict[Endpoint, Json] = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
    "completions": {"prompt": "One"},
    "embeddings": {"input": "One"},
}
SCHEMAS: dict[Endpoint, Json] = {
    "chat": chat_request(), "completions": completion_request(), "embeddings": embeddings_request()
}  # fmt: skip


def allowed(schema: Json, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def accepted(body: Json) -> bool:
    try:
        check_fields(body)
    except BadRequestError:
        return False
    return True


def test_every_checked_field_is_described() -> None:
    assert set(MEANINGS) == CHECKED - {"logprobs"}, "logprobs differs between chats and completions"
    assert set(HINT_MEANINGS) == set(HINTS)
    assert set(hints()) == set(HINTS)


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name: str) -> None:
    low, high, whole = RANGES[name]
    schema = checked_fields()[name]
    step = 1 if whole else 0.5
    value: Any
    for value in (None, low, high, low - step, high + step, "1", True, [], 0.5 if whole else 1):
        assert allowed(schema, value) == accepted({name: value}), (name, value)


@pytest.mark.parametrize("name", LISTS)
def test_sizes(name: str) -> None:
    most, longest = LISTS[name]
    schema = checked_fields()[name]
    values: list[Any] = [None, ["a"] * most, ["a"] * (most + 1)]
    if name == "stop":
        values += ["a" * longest, "a" * (longest + 1), ["a" * longest], ["a" * (longest + 1)], 5, {}]
    if name == "logit_bias":
        values = [None, {}, dict.fromkeys(map(str, range(most)), 1), dict.fromkeys(map(str, range(most + 1)), 1), []]
    for value in values:
        assert allowed(schema, value) == accepted({name: value}), (name, str(value)[:40])


@pytest.mark.parametrize(
    ("endpoint", "fields", "right"),
    [
        ("chat", {}, True),
        ("chat", {"messages": []}, False),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, True),
        ("chat", {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, False),
        ("chat", {"messages": [{"role": "robot", "content": "Hi"}]}, False),
        ("chat", {"messages": [{"role": "assistant", "content": None}]}, True),
        ("chat", {"messages": ["Hi"]}, False),
        ("chat", {"stream": "yes"}, False),
        ("chat", {"stream": True, "stream_options": {"include_usage": True}}, True),
        ("chat", {"stream": True, "stream_options": {"include_usage": 1}}, False),
        ("chat", {"model": 5}, False),
        ("chat", {"model": "a" * 513}, False),
        ("chat", {"urgency": "now"}, False),
        ("chat", {"urgency": "low", "fallback": "none", "continuation": "auto", "task_type": "code"}, True),
        ("chat", {"fallback": "never"}, False),
        ("chat", {"session_id": None, "backend": "vllm", "prompt_cache_key": "k"}, True),
        ("chat", {"response_format": {"type": "json_object"}}, True),
        ("chat", {"response_format": {"type": "xml"}}, False),
        ("chat", {"response_format": "json"}, False),
        ("chat", {"tools": {}}, False),
        ("chat", {"tool_choice": "auto"}, True),
        ("chat", {"tool_choice": "always"}, False),
        ("chat", {"tool_choice": ["f"]}, False),
        ("chat", {"something_new": {"of": ["an", "engine"]}}, True),
        ("completions", {"prompt": None}, False),
        ("completions", {"prompt": []}, False),
        ("completions", {"prompt": ["One", "Two"]}, True),
        ("completions", {"prompt": [1, 2]}, True),
        ("completions", {"prompt": [[1, 2], [3]]}, True),
        ("completions", {"prompt": [1, "Two"]}, False),
        ("completions", {"prompt": [-1]}, False),
        ("completions", {"logprobs": 20}, True),
        ("completions", {"logprobs": 21}, False),
        ("embeddings", {"input": ["a"] * 2048}, True),
        ("embeddings", {"input": ["a"] * 2049}, False),
        ("embeddings", {"input": 5}, False),
        ("embeddings", {"task_type": {"of": "another API"}}, True),
    ],
)
def test_bodies(endpoint: Endpoint, fields: Json, right: bool) -> None:
    body = {**LEAST[endpoint], **fields}
    schema = SCHEMAS[endpoint]
    if endpoint == "chat":
        schema = {**schema, "components": {"schemas": {"Message": message()}}}
    assert allowed(schema, body) == right
    try:
        parse_features(body, {}, endpoint, Limits())
    except BadRequestError:
        assert not right
    else:
        assert right


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "One"}, {}, {"prompt": ""}, {"prompt": "One", "max_tokens": 0}, {"prompt": "One", "urgency": "low"},
        {"prompt": "One", "urgency": "now"}, {"prompt": "One", "temperature": 2.5}, {"prompt": "One", "top_p": 0},
        {"prompt": "One", "stream": True, "backend": "auto", "task_type": None},
    ],
)  # fmt: skip
def test_generate(body: Json) -> None:
    try:
        parse_generate(body)
        right = True
    except BadRequestError:
        right = False
    schema = generate_request()
    assert set(schema["properties"]) == set(GenerateRequest.model_fields)
    assert allowed(schema, body) == right
