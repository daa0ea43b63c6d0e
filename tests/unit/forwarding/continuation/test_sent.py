from __future__ import annotations

from typing import Any

import pytest

from tests.support.chunks import OPENAI, Replica, delta, events, make_request, text
from tests.support.requests import make_call
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.forwarding.continuation.sent import (
    SentPrefix,
    is_complete,
    parse_sent_prefix,
    tokens_left,
    tokens_sent,
)


def sent(content: str, finish: str | None = None, usage: bool = False) -> SentPrefix:
    return SentPrefix({"id": "chatcmpl-1"}, content, 1, finish, usage)


def test_parse_sent_prefix_joins_the_text() -> None:
    block = events(delta(role="assistant", content=""), delta(content="One "), delta(content="two"))
    prefix = parse_sent_prefix(block)
    assert (prefix.text, prefix.pieces, prefix.finish, prefix.usage) == ("One two", 2, None, False)
    assert prefix.head["id"] == "chatcmpl-1"
    ended = parse_sent_prefix(block + events(delta("stop"), {**delta(), "choices": [], "usage": {"a": 1}}))
    assert (ended.finish, ended.usage) == ("stop", True)
    assert parse_sent_prefix(events(text("a"), text("b", "length"))).text == "ab"


def test_reasoning_has_two_names_and_comes_before_the_text() -> None:
    block = events(delta(reasoning="I "), delta(reasoning_content="think "), delta(reasoning="so", content="Yes"))
    prefix = parse_sent_prefix(block)
    assert (prefix.reasoning, prefix.text, prefix.in_reasoning, prefix.pieces) == ("I think so", "Yes", False, 3)
    thinking = parse_sent_prefix(events(delta(reasoning="I think ")))
    assert (thinking.in_reasoning, thinking.blank) == (True, " ")


def test_a_finished_tool_call_is_part_of_the_answer() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    prefix = parse_sent_prefix(events(delta(tool_calls=[call]), delta("tool_calls")))
    assert (prefix.calls, prefix.finish, prefix.empty) == ("f{}", "tool_calls", False)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([{"tool_calls": [{"index": 0, "function": {"name": "f"}}]}], "part of a tool call"),
        ([{"function_call": {"name": "f", "arguments": "{"}}], "part of a tool call"),
        ([{"refusal": "no"}], "refusal"),
        ([{"content": "a"}, {"reasoning": "hm"}], "reasoning after its text"),
    ],
)
def test_parse_sent_prefix_refuses_what_cannot_be_gone_on_from(pieces: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(UpstreamProtocolError, match=reason):
        parse_sent_prefix(events(*(delta(**piece) for piece in pieces)))


def test_a_prefix_is_complete_once_finish_reason_and_usage_were_sent() -> None:
    features = make_call(stream=True, stream_options={"include_usage": True}).features
    assert not is_complete(sent("a"), features)
    assert not is_complete(sent("a", "stop"), features)
    assert is_complete(sent("a", "stop", usage=True), features)
    assert is_complete(sent("a", "stop"), make_call(stream=True).features)


def test_tokens_left() -> None:
    assert tokens_left(make_call(max_tokens=10).features, 4) == 6
    assert tokens_left(make_call().features, 4) is None
    assert tokens_left(make_call("completions").features, 4) == 12, "OpenAI's default is 16"


async def test_tokens_sent_counts_chunks_if_the_replica_cannot_count() -> None:
    prefix = SentPrefix({}, "One two", 5, None, False)
    assert await tokens_sent(OPENAI, make_request(), prefix, Replica().post) == 5
    assert await tokens_sent(OPENAI, make_request(), sent("  "), Replica().post) == 0
