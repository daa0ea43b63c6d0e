from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.dialects.llama_cpp_python.request_models import checked_fields
from xgen_proxy.errors import BadRequestError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_known_fields_pass_and_unknown_ones_are_dropped() -> None:
    body = {**CHAT, "temperature": 0.5, "stream": True, "unknown": {"a": 1}}
    assert checked_fields("chat", body) == {**CHAT, "temperature": 0.5, "stream": True}


def test_a_schema_keeps_its_name() -> None:
    body = {**CHAT, "response_format": {"type": "json_object", "schema": {"type": "integer"}}}
    assert checked_fields("chat", body) == body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"top_k": 2**31}, "top_k"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias.x.[key]"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages.0"),
        ({"messages": [{"role": "function", "content": "1"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        checked_fields("chat", {**CHAT, **fields})
    assert caught.value.param == param
    assert caught.value.message.startswith(param)


def test_a_long_key_is_not_repeated() -> None:
    with pytest.raises(BadRequestError) as caught:
        checked_fields("chat", {**CHAT, "logit_bias": {"x" * 100_000: 1.0}})
    assert len(caught.value.message) < 200
    assert len(caught.value.param or "") < 200


def test_the_number_of_messages_is_limited() -> None:
    with pytest.raises(BadRequestError, match="at most 2000 items"):
        checked_fields("chat", {**CHAT, "messages": CHAT["messages"] * 2001})


def test_each_endpoint_has_its_fields() -> None:
    assert checked_fields("completions", {"model": "m", "prompt": "a", "echo": True})["echo"] is True
    assert checked_fields("embeddings", {"model": "m", "input": ["a"], "user": "x"}) == {"model": "m", "input": ["a"]}
