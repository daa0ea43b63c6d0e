"""Turns as strict chat templates want them: of recorded requests of Codex, and of generated conversations."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.documents import ROOT
from xgen_proxy.translation.responses.items import read_messages

Json = dict[str, Any]
FIXTURES = ROOT / "tests" / "fixtures"
FIRST, SECOND = [exchange["body"] for exchange in json.loads((FIXTURES / "clients" / "codex-0.169.0.json").read_text())]
WITH_TOOLS = json.loads((FIXTURES / "codex_request.json").read_text())


def without_system(messages: list[Json]) -> list[Json]:
    return messages[1:] if messages[0]["role"] == "system" else messages


def check_as_gemma(messages: list[Json]) -> None:
    """Its template refuses two messages of one kind in a row. https://huggingface.co/google/gemma-3-4b-it"""
    for number, message in enumerate(without_system(messages)):
        assert (message["role"] == "user") == (number % 2 == 0), [each["role"] for each in messages]


def check_as_devstral(messages: list[Json]) -> None:
    """Its template takes calls and their results out first.
    https://huggingface.co/mistralai/Devstral-Small-2-24B-Instruct-2512"""
    check_as_gemma([each for each in messages if each["role"] != "tool" and not each.get("tool_calls")])


def test_strict_templates_take_the_first_request_of_codex() -> None:
    messages, _ = read_messages(FIRST)
    check_as_gemma(messages)
    check_as_devstral(messages)
    texts = [part["text"] for item in FIRST["input"] for part in item["content"]]
    assert all(any(text in message["content"] for message in messages) for text in texts)


@pytest.mark.parametrize("body", [SECOND, WITH_TOOLS], ids=["one call", "thoughts and calls"])
def test_strict_templates_take_calls_of_codex(body: Json) -> None:
    messages, _ = read_messages(body)
    check_as_devstral(messages)
    assert [message["role"] for message in messages[:4]] == ["system", "user", "assistant", "tool"]


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
BETWEEN: list[Json] = [  # may stand anywhere
    {"role": "user", "content": "a"},
    {"role": "user", "content": []},
    {"role": "user", "content": [{"type": "input_text", "text": "b"}, IMAGE]},
    {"role": "developer", "content": "c"},
    {"role": "developer", "content": ""},
    {"role": "assistant", "content": ""},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
    {"type": "reasoning", "summary": [], "encrypted_content": "gA"},
    {"type": "web_search_call", "id": "ws_1", "status": "completed"},
]
OUTPUTS: list[Any] = ["d", "", [IMAGE], [{"type": "input_text", "text": "e"}, IMAGE]]


@st.composite
def conversations(draw: st.DrawFn) -> list[Json]:
    """Items of some turns. Every call has its result before the assistant goes on."""
    between = st.lists(st.sampled_from(BETWEEN), max_size=3)
    items: list[Json] = []
    for turn in range(draw(st.integers(1, 4))):
        items += draw(between)
        if draw(st.booleans()):
            items.append({"role": "assistant", "content": "said"})
        ids = [f"{turn}.{number}" for number in range(draw(st.integers(0, 2)))]
        items += [{"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"} for id in ids]
        for id in draw(st.permutations(ids)):
            output = draw(st.sampled_from(OUTPUTS))
            items += [*draw(between), {"type": "function_call_output", "call_id": id, "output": output}]
    return [*items, {"role": "user", "content": "end"}]


@given(conversations())
@settings(max_examples=300)
def test_no_two_messages_of_the_user_stand_side_by_side(items: list[Json]) -> None:
    messages, _ = read_messages({"input": items})
    roles = [message["role"] for message in messages]
    assert ("user", "user") not in pairwise(roles), roles
    assert "system" not in roles[1:]


@given(conversations())
@settings(max_examples=300)
def test_results_follow_their_calls_directly(items: list[Json]) -> None:
    messages, _ = read_messages({"input": items})
    awaited: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] in awaited
            awaited.remove(message["tool_call_id"])
        else:
            assert not awaited
            awaited = {call["id"] for call in message.get("tool_calls", ())}
    results = [item["call_id"] for item in items if item.get("type") == "function_call_output"]
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == results
