"""The fields of a request. Its messages, blocks and tools have tests of their own."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.parsing import parse_features
from xgen_proxy.translation.messages.blocks import Dropped
from xgen_proxy.translation.messages.request import to_chat

HI = [{"role": "user", "content": "Hi"}]
LEAST = {"model": "m", "max_tokens": 10, "messages": HI}
SCHEMA = {"type": "object", "properties": {}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "output", "schema": SCHEMA}}


def translated(**fields: Any) -> tuple[dict[str, Any], list[str]]:
    dropped: Dropped = {}
    return to_chat({**LEAST, **fields}, dropped, strip_attribution=True), list(dropped)


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, {}),
        ({"stream": False}, {}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"system": "Be brief."}, {"messages": [{"role": "system", "content": "Be brief."}, *HI]}),
        ({"max_tokens": 0}, {"max_tokens": 1}),
        ({"temperature": 1, "top_p": 0.9, "top_k": 40}, {"temperature": 1, "top_p": 0.9, "top_k": 40}),
        ({"temperature": None}, {}),
        ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop_sequences": []}, {}),
        ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, {}),
        ({"thinking": {"type": "between_tools"}}, {}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {"response_format": FORMAT}),
        ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, {"response_format": FORMAT}),
        ({"urgency": "low", "backend": "vllm"}, {"urgency": "low", "backend": "vllm"}),
        ({"cache_control": {"type": "ephemeral"}, "service_tier": "auto", "betas": ["x"]}, {}),
        (
            {"messages": [*HI, {"role": "assistant", "content": "The answer is"}]},
            {
                "messages": [*HI, {"role": "assistant", "content": "The answer is"}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
        ),
    ],
)
def test_fields(fields: dict[str, Any], added: dict[str, Any]) -> None:
    chat, dropped = translated(**fields)
    assert chat == {**LEAST, **added}
    assert dropped == []
    parse_features(chat, {}, "chat", Limits())  # as any client's chat


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, ["thinking.budget_tokens"]),
        ({"context_management": {"edits": []}, "mcp_servers": []}, ["context_management", "mcp_servers"]),
        ({"foo": 1}, ["foo"]),
    ],
)
def test_what_cannot_be_asked_for_is_told(fields: dict[str, Any], names: list[str]) -> None:
    assert translated(**fields) == (LEAST, names)


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        ("user_ab12_account_77_session_0c41-9d", "0c41-9d"),
        (orjson.dumps({"device_id": "d", "session_id": "0c41"}).decode(), "0c41"),
        ("someone", None),
        ("{someone", None),
        ('{"session_id": 5}', None),
        (None, None),
    ],
)
def test_the_session_of_claude_code(user_id: str | None, session: str | None) -> None:
    chat, _ = translated(metadata={"user_id": user_id})
    assert chat.get("prompt_cache_key") == session
    assert parse_features(chat, {}, "chat", Limits()).session == session


@pytest.mark.parametrize(("hint", "headers"), [({"session_id": "mine"}, {}), ({}, {b"x-session-id": b"mine"})])
def test_a_session_that_is_a_hint_wins(hint: dict[str, str], headers: dict[bytes, bytes]) -> None:
    chat, _ = translated(metadata={"user_id": "user_a_session_b"}, **hint)
    assert parse_features(chat, headers, "chat", Limits()).session == "mine"


def test_a_count_has_no_limits() -> None:
    body = {"model": "m", "messages": HI, "system": "S", "tools": [{"name": "f", "input_schema": SCHEMA}]}
    chat = to_chat(body, {}, strip_attribution=True, counts=True)
    assert list(chat) == ["model", "messages", "tools"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stream": "yes"}, "stream"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"output_config": {"effort": 1}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"metadata": "me"}, "metadata"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as error:
        translated(**fields)
    assert error.value.param == param
    assert param in error.value.message
