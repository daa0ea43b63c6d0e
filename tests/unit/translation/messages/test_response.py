"""Whole answers."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from xgen_proxy.translation.chat import Answer, Finish, ToolCall, Usage, tool_input
from xgen_proxy.translation.messages.response import message_of, stop_reason, usage_of

CALL = ToolCall("call_1", "read", '{"path":"a"}')
USE = {"type": "tool_use", "id": "call_1", "name": "read", "input": {"path": "a"}}
THOUGHT = {"type": "thinking", "thinking": "Hm", "signature": "xgen-proxy"}


def answer(text: str = "", reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> Answer:
    return Answer(text, reasoning, calls, Finish("tool_calls" if calls else "stop"), Usage(5, 2))


def test_a_message() -> None:
    assert message_of(answer("Hi"), "1", "claude") == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [{"type": "text", "text": "Hi"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 2,
        },
    }


@pytest.mark.parametrize(
    ("found", "content"),
    [
        (answer(), [{"type": "text", "text": ""}]),
        (answer("Hi", "Hm"), [THOUGHT, {"type": "text", "text": "Hi"}]),
        (answer(reasoning="Hm"), [THOUGHT]),
        (answer(calls=(CALL,)), [USE]),
        (
            answer(calls=(ToolCall("", "now", ""),)),
            [{"type": "tool_use", "id": "toolu_1_0", "name": "now", "input": {}}],
        ),
        (
            answer("I read.", "Hm", (CALL, ToolCall("call_2", "now", ""))),
            [
                THOUGHT,
                {"type": "text", "text": "I read."},
                USE,
                {"type": "tool_use", "id": "call_2", "name": "now", "input": {}},
            ],
        ),
    ],
)
def test_content(found: Answer, content: list[dict[str, Any]]) -> None:
    assert orjson.loads(orjson.dumps(message_of(found, "1", "m")))["content"] == content


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (" ", {}),
        ('{"a": 1', {"INVALID_JSON": '{"a": 1'}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ("null", {"INVALID_JSON": "null"}),
        ("NaN", {"INVALID_JSON": "NaN"}),
    ],
)
def test_arguments(arguments: str, expected: dict[str, Any]) -> None:
    """Those that are no object are told, never a failure of the whole answer."""
    assert orjson.loads(orjson.dumps(tool_input(arguments))) == expected


def test_large_integers_in_arguments_stay_exact() -> None:
    found = answer(calls=(ToolCall("a", "pay", '{"wei": 123456789012345678901}'),))
    assert b'"input":{"wei": 123456789012345678901}' in orjson.dumps(message_of(found, "1", "m"))


@pytest.mark.parametrize(
    ("finish", "called", "expected"),
    [
        (Finish("stop"), False, ("end_turn", None)),
        (Finish("stop", "END"), False, ("stop_sequence", "END")),
        (Finish("length"), False, ("max_tokens", None)),
        (Finish("length"), True, ("max_tokens", None)),  # the call may be cut short
        (Finish("tool_calls"), True, ("tool_use", None)),
        (Finish("tool_calls"), False, ("end_turn", None)),
        (Finish("stop"), True, ("tool_use", None)),  # vLLM, for a call that was forced
        (Finish("content_filter"), False, ("refusal", None)),
        (Finish("function_call"), False, ("end_turn", None)),
    ],
)
def test_stop_reasons(finish: Finish, called: bool, expected: tuple[str, str | None]) -> None:
    assert stop_reason(finish, called=called) == expected


def test_cached_tokens_are_no_input_tokens() -> None:
    usage = usage_of(Usage(prompt=100, completion=7, cached=90, reasoning=3))
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (10, 90, 7)
    assert usage["output_tokens_details"] == {"thinking_tokens": 3}
