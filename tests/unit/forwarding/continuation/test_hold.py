from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import delta, events
from tests.support.requests import make_call
from xgen_proxy.forwarding.continuation import hold
from xgen_proxy.forwarding.continuation.hold import Hold, hold_for
from xgen_proxy.request.features import Json

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOLS: Json = {"tools": [TOOL]}
JSON: Json = {"response_format": {"type": "json_object"}}


def call(arguments: str) -> Json:
    return delta(tool_calls=[{"index": 0, "function": {"arguments": arguments}}])


def made(*, constrained: bool = False, **fields: Any) -> Hold:
    made = hold_for(make_call(**fields).features, constrained=constrained)
    assert made is not None
    return made


def test_plain_text_and_streamed_json_have_no_hold() -> None:
    assert hold_for(make_call().features, constrained=True) is None
    assert hold_for(make_call(**JSON).features, constrained=False) is None


def test_a_tool_call_is_held_until_it_is_complete() -> None:
    holds = made(**TOOLS)
    text = events(delta(role="assistant", content=""), delta(content=r'I call "tool_calls": [{'))
    assert holds.feed(text) == text
    assert not holds.holding
    assert holds.feed(text + events(call("{"))) == text
    assert holds.holding
    assert holds.feed(events(call("}"))) == b""
    end = events(delta("tool_calls"))
    assert holds.feed(end) == events(call("{"), call("}")) + end
    usage = events({**delta(), "choices": [], "usage": {"prompt_tokens": 1}})
    assert holds.feed(usage) == usage


def test_constrained_text_is_held_if_set_but_not_the_reasoning_before_it() -> None:
    holds = made(constrained=True, **JSON)
    before = events(delta(role="assistant", content=""), delta(reasoning="hm", content=None))
    assert holds.feed(before) == before
    assert holds.feed(events(delta(content="{"))) == b""
    assert holds.feed(events(delta("stop", content="}"))) == events(delta(content="{"), delta("stop", content="}"))


@given(st.lists(st.integers(0, 3), max_size=8))
def test_nothing_is_lost_or_reordered(cuts: list[int]) -> None:
    chunks = [delta(content="a"), delta(content="b"), call("{"), call("}"), delta("tool_calls"), delta()]
    holds, out, rest = made(**TOOLS), b"", list(chunks)
    for size in [*cuts, len(chunks)]:
        block, rest = rest[:size], rest[size:]
        out += holds.feed(events(*block))
    assert out == events(*chunks)


def test_a_block_that_is_too_long_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "LIMIT", 1000)
    holds = made(**TOOLS)
    assert holds.feed(events(call("x" * 500))) == b""
    assert holds.feed(events(call("y" * 500))) == events(call("x" * 500), call("y" * 500))
    assert holds.feed(events(call("z"))) == events(call("z"))


def test_the_pass_through_gets_nothing_that_is_to_be_held() -> None:
    passed: list[bytes] = []
    holds = made(**TOOLS)
    assert holds.guard(None) is None

    def direct(data: bytes) -> bool:
        passed.append(data)
        return True

    on_data = holds.guard(direct)
    assert on_data is not None
    text, calls = events(delta(content="a")), events(call("{"))
    assert on_data(text)
    assert not on_data(calls)
    holds.feed(calls)
    assert not on_data(text)
    assert passed == [text]


def test_a_client_that_waits_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    holds = made(**TOOLS)
    assert not holds.wants_comment()
    holds.feed(events(call("{")))
    assert not holds.wants_comment()
    monkeypatch.setattr(hold, "COMMENT_S", 0)
    assert holds.wants_comment()
