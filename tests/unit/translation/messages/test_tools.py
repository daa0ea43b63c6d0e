from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.translation.messages.blocks import Dropped
from xgen_proxy.translation.messages.tools import tool_fields

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
READ = {"name": "read", "description": "Reads a file.", "input_schema": SCHEMA}
FUNCTION = {
    "type": "function",
    "function": {"name": "read", "parameters": SCHEMA, "description": "Reads a file."},
}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}


def fields(**body: Any) -> dict[str, Any]:
    return tool_fields(body, {})


@pytest.mark.parametrize("tool", [READ, {**READ, "type": "custom"}, {**READ, "cache_control": {}, "type": None}])
def test_a_tool_is_a_function(tool: dict[str, Any]) -> None:
    assert fields(tools=[tool]) == {"tools": [FUNCTION]}


def test_a_schema_without_a_type_is_an_objects() -> None:
    [tool] = fields(tools=[{"name": "now", "input_schema": {}, "strict": True}])["tools"]
    assert tool["function"] == {"name": "now", "parameters": {"type": "object"}, "strict": True}


@pytest.mark.parametrize(
    "body", [{}, {"tools": []}, {"tools": None}, {"tools": [SEARCH], "tool_choice": {"type": "any"}}]
)
def test_without_tools_there_is_no_choice(body: dict[str, Any]) -> None:
    assert fields(**body) == {}


def test_tools_that_no_engine_has_are_told() -> None:
    dropped: Dropped = {}
    kinds = ["web_search_20250305", "computer_20250124", "bash_20250124", "text_editor_20250728"]
    found = tool_fields({"tools": [READ, *({"type": kind, "name": "x"} for kind in kinds)]}, dropped)
    assert found == {"tools": [FUNCTION]}
    assert list(dropped) == kinds


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "read"}, {"tool_choice": {"type": "function", "function": {"name": "read"}}}),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
        ({"type": "any", "disable_parallel_tool_use": False}, {"tool_choice": "required"}),
        (None, {}),
    ],
)
def test_choices(choice: Any, expected: dict[str, Any]) -> None:
    assert fields(tools=[READ], tool_choice=choice) == {"tools": [FUNCTION], **expected}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["read"]}, "tools.0"),
        ({"tools": [{"name": "read"}]}, "tools.0.input_schema"),
        ({"tools": [{"name": "read", "input_schema": "x"}]}, "tools.0.input_schema"),
        ({"tools": [READ, {"input_schema": SCHEMA}]}, "tools.1.name"),
        ({"tools": [{**READ, "type": 5}]}, "tools.0.type"),
        ({"tools": [READ], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [READ], "tool_choice": {}}, "tool_choice.type"),
        ({"tools": [READ], "tool_choice": {"type": ["auto"]}}, "tool_choice.type"),
        ({"tools": [READ], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [READ], "tool_choice": {"type": "tool", "name": "write"}}, "tool_choice.name"),
        ({"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}}, "tool_choice.name"),
        (
            {"tools": [READ], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
            "tool_choice.disable_parallel_tool_use",
        ),
    ],
)
def test_a_bad_field_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as error:
        fields(**body)
    assert error.value.param == param
    assert param in error.value.message
