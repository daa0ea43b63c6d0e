from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import LLAMA_SERVER, OPENAI, Replica, delta, events, make_request, read, text
from tests.support.images import about, image
from tests.support.requests import make_call
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.forwarding.continuation import (
    ResumedStream,
    SentPrefix,
    is_complete,
    parse_sent_prefix,
    resumed_request,
    tokens_left,
    tokens_sent,
    why_not_resumable,
)
from xgen_proxy.request.features import Json

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def sent(content: str, finish: str | None = None, usage: bool = False) -> SentPrefix:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
    return SentPrefix(head, content, 1, finish, usage)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"messages": about(image())}, None),
        ({"tools": [TOOL]}, "tools cannot be resumed"),
        ({"logprobs": True, "n": 2}, "logprobs, n cannot be resumed"),
        ({"continuation": "none"}, "opted out"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "the client's own words"),
        ({"continue_final_message": False}, "how the prompt ends"),
    ],
)
def test_why_not_resumable(fields: dict[str, Any], reason: str | None) -> None:
    call = make_call(**fields)
    found = why_not_resumable(call.features, call.body)
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")


def test_parse_sent_prefix_joins_the_text() -> None:
    block = events(delta(role="assistant", content=""), delta(content="One "), delta(content="two"))
    prefix = parse_sent_prefix(block)
    assert (prefix.text, prefix.pieces, prefix.finish, prefix.usage) == ("One two", 2, None, False)
    assert prefix.head["id"] == "chatcmpl-1"
    ended = parse_sent_prefix(block + events(delta("stop"), {**delta(), "choices": [], "usage": {"a": 1}}))
    assert (ended.finish, ended.usage) == ("stop", True)
    assert parse_sent_prefix(events(text("a"), text("b", "length"))).text == "ab"


@pytest.mark.parametrize("piece", [{"reasoning": "hm"}, {"tool_calls": [{"index": 0}]}])
def test_parse_sent_prefix_refuses_more_than_text(piece: dict[str, Any]) -> None:
    with pytest.raises(UpstreamProtocolError, match=next(iter(piece))):
        parse_sent_prefix(events(delta(content="a"), delta(**piece)))


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


def test_a_completion_is_resumed_by_its_prompt() -> None:
    request = make_request("completions", prompt=["One"], min_tokens=5, max_tokens=9)
    resumed = resumed_request(LLAMA_SERVER, request, sent(" two "), 3, None)
    assert resumed.body == {"model": "m", "prompt": "One two", "min_tokens": 4, "max_tokens": 3}
    assert (resumed.raw, resumed.features.max_tokens) == (None, 3)
    assert request.body["prompt"] == ["One"], "the client's body is unchanged"


def test_a_chat_without_text_is_asked_again() -> None:
    request = make_request(max_completion_tokens=9)
    resumed = resumed_request(LLAMA_SERVER, request, sent(""), 9, None)
    assert resumed.body["messages"] == request.body["messages"]
    assert (resumed.body["max_tokens"], "max_completion_tokens" in resumed.body) == (9, False)


async def test_a_resumed_stream_looks_like_the_broken_one() -> None:
    features = make_call(stream=True, stream_options={"include_usage": True}).features
    resumed = ResumedStream(sent("One "), 2, features, usage_only=False)
    other = {"id": "chatcmpl-other", "created": 99}
    block = events(
        {**delta(role="assistant", content=""), **other},
        {**delta(content=" two"), **other},
        {**delta("stop"), **other},
        {**delta(), **other, "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}},
    )
    chunks = read(resumed.edit(block) + await resumed.finish(Replica().post))
    assert {(chunk["id"], chunk["created"]) for chunk in chunks} == {("chatcmpl-1", 5)}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"content": "two"}, {}]
    assert chunks[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


async def test_a_resumed_stream_may_bring_only_the_usage() -> None:
    features = make_call(stream=True, stream_options={"include_usage": True}).features
    resumed = ResumedStream(sent("One", "stop"), 1, features, usage_only=True)
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    assert resumed.edit(events(delta(content="x"), {**delta("length"), "usage": usage})) == b""
    [last] = read(await resumed.finish(Replica().post))
    assert last["usage"] == {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9}


@given(st.text(alphabet=" \ta", max_size=6), st.lists(st.text(alphabet=" \ta", min_size=1, max_size=3), max_size=6))
def test_no_space_is_sent_twice_or_lost(prefix_text: str, rest: list[str]) -> None:
    """The resuming model is shown the text without its trailing spaces, and so may write them again."""
    prefix = sent(prefix_text)
    written = prefix.blank + "".join(rest)
    resumed = ResumedStream(prefix, 0, make_call(stream=True).features, usage_only=False)
    pieces: list[Json] = [delta(content=character) for character in written]
    out = read(resumed.edit(events(*pieces))) if pieces else []
    assert prefix_text + "".join(chunk["choices"][0]["delta"]["content"] for chunk in out) == prefix.partial + written
