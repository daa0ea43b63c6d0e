from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import Replica, delta, events, read
from tests.support.requests import make_call
from xgen_proxy.errors import DifferentAnswerError
from xgen_proxy.forwarding.continuation.resumed import ResumedStream, Way
from xgen_proxy.forwarding.continuation.sent import SentPrefix
from xgen_proxy.request.features import Json

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def sent(text: str = "", finish: str | None = None, usage: bool = False, reasoning: str = "") -> SentPrefix:
    return SentPrefix(HEAD, text, 1, finish, usage, reasoning)


async def test_a_resumed_stream_looks_like_the_broken_one() -> None:
    features = make_call(stream=True, stream_options={"include_usage": True}).features
    resumed = ResumedStream(sent("One "), 2, features)
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
    resumed = ResumedStream(sent("One", "stop"), 1, features, "usage")
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    assert resumed.edit(events(delta(content="x"), {**delta("length"), "usage": usage})) == b""
    [last] = read(await resumed.finish(Replica().post))
    assert last["usage"] == {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}


@pytest.mark.parametrize(
    ("way", "told", "kept"),
    [
        ("continue", {"prompt_tokens_details": {"cached_tokens": 4}}, {"prompt_tokens_details": {"cached_tokens": 4}}),
        ("continue", {"prompt_tokens_details": {"cached_tokens": 8}}, {"prompt_tokens_details": {"cached_tokens": 7}}),
        ("continue", {"completion_tokens_details": {"reasoning_tokens": 1}}, {}),
        ("continue", {"prompt_tokens_details": None}, {}),
        ("repeat", {"completion_tokens_details": {"reasoning_tokens": 1}}, None),
    ],
)
async def test_details_of_usage_that_still_hold_are_kept(way: Way, told: Json, kept: Json | None) -> None:
    features = make_call(stream=True, stream_options={"include_usage": True}).features
    resumed = ResumedStream(sent("One "), 2, features, way)
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, **told}
    resumed.edit(events(delta(content="One two"), delta("stop"), {**delta(), "choices": [], "usage": usage}))
    [last] = read(await resumed.finish(Replica().post))
    details = {name: value for name, value in last["usage"].items() if name.endswith("_details")}
    assert details == (told if kept is None else kept)


@given(st.text(alphabet=" \ta", max_size=6), st.lists(st.text(alphabet=" \ta", min_size=1, max_size=3), max_size=6))
def test_no_space_is_sent_twice_or_lost(prefix_text: str, rest: list[str]) -> None:
    """The resuming model is shown the text without its trailing spaces, and so may write them again."""
    prefix = sent(prefix_text)
    written = prefix.blank + "".join(rest)
    resumed = ResumedStream(prefix, 0, make_call(stream=True).features)
    pieces: list[Json] = [delta(content=character) for character in written]
    out = read(resumed.edit(events(*pieces))) if pieces else []
    assert prefix_text + "".join(chunk["choices"][0]["delta"]["content"] for chunk in out) == prefix.partial + written


def edited(prefix: SentPrefix, *chunks: Json, repeats: bool = False) -> list[Json]:
    """The deltas of a resumed stream."""
    resumed = ResumedStream(prefix, 0, make_call(stream=True).features, "repeat" if repeats else "continue")
    block = events(*chunks)
    resumed.check(block)
    return [chunk["choices"][0]["delta"] for chunk in read(resumed.edit(block))]


def test_reasoning_goes_on_as_reasoning_and_then_text() -> None:
    prefix = sent(reasoning="I think ")
    deltas = edited(prefix, delta(reasoning_content=" that"), delta(content="Yes"), delta("stop"))
    assert deltas == [{"reasoning": "that"}, {"content": "Yes"}, {}]


def test_a_tool_call_follows_the_text() -> None:
    assert edited(sent("So:"), delta(tool_calls=[CALL]), delta("tool_calls")) == [{"tool_calls": [CALL]}, {}]


@pytest.mark.parametrize(
    ("prefix", "first", "repeats"),
    [
        (sent(reasoning="hm"), {"content": "more reasoning</think>"}, False),
        (sent("Yes", reasoning="hm"), {"reasoning": "text"}, False),
        (sent("Yes"), {"reasoning": "text"}, False),
        (sent(reasoning="hm"), {"content": "reasoning</think>"}, True),
    ],
    ids=["reasoning", "text after reasoning", "text", "asked again"],
)
def test_an_engine_that_misunderstands_is_found_out(prefix: SentPrefix, first: Json, repeats: bool) -> None:
    """One without a parser of reasoning sends it as text; one that was not told takes text for reasoning."""
    with pytest.raises(DifferentAnswerError):
        edited(prefix, delta(role="assistant", content=""), delta(**first), repeats=repeats)


def test_an_answer_given_again_brings_only_what_is_new() -> None:
    again = delta(content='{"a'), delta(content='": 1'), delta(content="}"), delta("stop")
    assert edited(sent('{"a":'), *again, repeats=True) == [{"content": " 1"}, {"content": "}"}, {}]


@pytest.mark.parametrize("again", ["Look.", "Look.\n", "Look.\n\n", "Look.\n\n\n"])
def test_white_space_at_the_end_need_not_come_again(again: str) -> None:
    """An engine that writes a call at once leaves out the line breaks before it."""
    call = delta(tool_calls=[CALL])
    deltas = edited(sent("Look.\n\n"), delta(content=again[:3]), delta(content=again[3:]), call, repeats=True)
    new = [{"content": "\n"}] if again.endswith("\n\n\n") else []
    assert deltas == [*new, {"tool_calls": [CALL]}]


def test_a_call_is_given_again_after_reasoning_and_white_space() -> None:
    again = delta(reasoning="Well,"), delta(tool_calls=[CALL]), delta("tool_calls")
    assert edited(sent("\n\n", reasoning="I think"), *again, repeats=True) == [{"tool_calls": [CALL]}, {}]


@pytest.mark.parametrize("way", ["continue", "repeat"])
def test_an_answer_without_output_has_not_begun(way: Way) -> None:
    resumed = ResumedStream(sent(reasoning="hm"), 1, make_call(stream=True).features, way)
    nothing = events(delta(role="assistant", content=""), delta(content=""), delta(reasoning=""))
    assert not resumed.check(nothing)
    assert resumed.check(nothing + events(delta(reasoning="so")))
    assert resumed.check(nothing + events(delta("stop")))
    with pytest.raises(DifferentAnswerError):
        resumed.check(nothing + events(delta(content="so")))


async def test_the_prompt_counts_what_the_engine_was_shown() -> None:
    """Templates such as DeepSeek-R1's leave out the 300 tokens of reasoning."""
    features = make_call(stream=True, stream_options={"include_usage": True}).features
    usage = {"prompt_tokens": 22, "completion_tokens": 3, "total_tokens": 25}
    for in_prompt, prompt in ((2, 20), (None, 0)):
        resumed = ResumedStream(sent("Yes", reasoning="hm"), 302, features, "relabel", in_prompt)
        resumed.edit(events({**delta(reasoning=" it"), "usage": usage}))
        [last] = read(await resumed.finish(Replica().post))
        assert last["usage"] == {"prompt_tokens": prompt, "completion_tokens": 305, "total_tokens": prompt + 305}


@pytest.mark.parametrize("again", [[delta(content='{"b')], [delta(content='{"'), delta("stop")]])
def test_another_answer_is_refused(again: list[Json]) -> None:
    with pytest.raises(DifferentAnswerError):
        edited(sent('{"a":'), *again, repeats=True)


def test_text_that_the_engine_calls_reasoning_is_text() -> None:
    resumed = ResumedStream(sent("Yes "), 0, make_call(stream=True).features, "relabel")
    block = events(delta(role="assistant", content=""), delta(reasoning=" it"), delta(reasoning=" is"), delta("stop"))
    resumed.check(block)
    assert [chunk["choices"][0]["delta"] for chunk in read(resumed.edit(block))] == [
        {"content": "it"},
        {"content": " is"},
        {},
    ]


def test_reasoning_given_again_is_dropped() -> None:
    """The client has the beginning of other reasoning."""
    again = delta(reasoning="Well,"), delta(content="Yes"), delta("stop")
    assert edited(sent(reasoning="I think"), *again, repeats=True) == [{"content": "Yes"}, {}]


def test_a_stream_of_which_nothing_was_sent_gets_its_role() -> None:
    prefix = SentPrefix({}, "", 0, None, False)
    deltas = edited(prefix, delta(role="assistant", content=""), delta(reasoning="hm"), repeats=True)
    assert deltas == [{"role": "assistant", "reasoning": "hm"}]
