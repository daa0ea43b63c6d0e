from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.request.corrections import corrected

USER = {"role": "user", "content": "Hi"}
RESULT = {"role": "tool", "tool_call_id": "a"}

CORRECTIONS = [
    ({"max_tokens": 100.0, "n": 1.0, "seed": -5.0}, {"max_tokens": 100, "n": 1, "seed": -5}),
    ({"max_tokens": -1}, {}),
    ({"max_tokens": -1.0}, {}),
    ({"max_tokens": -1, "max_completion_tokens": 5}, {"max_completion_tokens": 5}),
    ({"n_predict": 7}, {"max_tokens": 7}),
    ({"n_predict": -1}, {}),
    ({"n_predict": 7, "max_tokens": None}, {"max_tokens": 7}),
    ({"n_cmpl": 4.0}, {"n": 4}),
    ({"n_predict": 7, "max_tokens": 5}, {"max_tokens": 5}),
    ({"tools": []}, {}),
    ({"tools": [], "tool_choice": "auto"}, {}),
    ({"tools": None, "tool_choice": "none"}, {}),
    ({"tool_choice": "auto"}, {}),
    ({"tools": [], "tool_choice": None}, {}),
    ({"tools": [], "tool_choice": "required"}, {"tool_choice": "required"}),
    ({"messages": [USER, {**RESULT, "content": None}]}, {"messages": [USER, {**RESULT, "content": ""}]}),
    ({"messages": [RESULT]}, {"messages": [{**RESULT, "content": ""}]}),
]


@pytest.mark.parametrize(("sent", "meant"), CORRECTIONS)
def test_what_clients_send_is_corrected(sent: dict[str, Any], meant: dict[str, Any]) -> None:
    fixed = corrected(sent)
    assert fixed == meant
    assert {name: type(value) for name, value in fixed.items()} == {name: type(value) for name, value in meant.items()}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [USER], "max_tokens": 5, "temperature": 1.0},
        {"messages": [USER], "tools": [{"function": {"name": "f"}}], "tool_choice": "auto"},
        {"max_tokens": 1.5, "n": 1e300, "unknown": 2.0},
        {"tools": {}},
        {"messages": "Hi"},
        {"messages": [5, {"role": ["tool"]}, {"role": "assistant", "content": None}]},
    ],
)
def test_anything_else_stays_the_same_object(body: dict[str, Any]) -> None:
    assert corrected(body) is body


NAMES = st.sampled_from(["messages", "role", "content", "tools", "tool_choice", "max_tokens", "n_predict", "n"])
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "tool"]),
                      lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner))  # fmt: skip


@given(st.dictionaries(NAMES, VALUES))
def test_any_object_is_taken(body: dict[str, Any]) -> None:
    once = corrected(body)
    assert corrected(once) is once
