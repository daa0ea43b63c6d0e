"""Tools of the client's as functions of a chat, and calls of them on their way back."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.errors import BadRequestError
from xgen_proxy.translation.responses.tools import (
    HOW_TO_CALL,
    INPUT_SCHEMA,
    InputDecoder,
    Tool,
    call_item,
    decode_input,
    encode_input,
    read_tools,
)

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "description": "W", "strict": False, "parameters": SCHEMA}
CLOCK = {"type": "function", "name": "clock", "parameters": None, "strict": True}
PATCH = {
    "type": "custom", "name": "apply_patch", "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"},
}  # fmt: skip
GIT = {"type": "namespace", "name": "mcp__git", "description": "G", "tools": [CLOCK, PATCH]}
SEARCH = {"type": "web_search", "external_web_access": False}

WEATHER_CHAT = {"type": "function", "function": {"name": "weather", "description": "W", "parameters": SCHEMA}}
CLOCK_CHAT = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}, "strict": True},
}
PATCH_CHAT = {
    "type": "function",
    "function": {
        "name": "apply_patch",
        "description": f"Edit files.\n\n{HOW_TO_CALL}\n\n`input` follows this grammar (lark):\nstart: x",
        "parameters": INPUT_SCHEMA,
    },
}

LEAST_CHAT = {
    "type": "function",
    "function": {"name": "c", "description": HOW_TO_CALL, "parameters": INPUT_SCHEMA},
}


def renamed(tool: dict[str, Any], name: str) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "name": name}}


# (tools, tool_choice, offered, the chat's choice, dropped)
CASES: list[tuple[list[Any] | None, Any, list[Any], Any, tuple[str, ...]]] = [
    (None, None, [], None, ()),
    ([], "auto", [], None, ()),
    ([WEATHER, CLOCK], None, [WEATHER_CHAT, CLOCK_CHAT], None, ()),
    ([WEATHER], "required", [WEATHER_CHAT], "required", ()),
    ([WEATHER], "none", [WEATHER_CHAT], "none", ()),
    ([PATCH], "auto", [PATCH_CHAT], "auto", ()),
    ([{"type": "custom", "name": "c"}], None, [LEAST_CHAT], None, ()),
    ([GIT], None, [renamed(CLOCK_CHAT, "mcp__git__clock"), renamed(PATCH_CHAT, "mcp__git__apply_patch")], None, ()),
    ([SEARCH, {"type": "local_shell"}, SEARCH, WEATHER], "auto", [WEATHER_CHAT], "auto", ("web_search", "local_shell")),
    ([SEARCH], "auto", [], None, ("web_search",)),
    ([{"type": "a\r\nb: c"}], None, [], None, ("a\r\nb: c",)),
    ([WEATHER, CLOCK], {"type": "function", "name": "clock"}, [WEATHER_CHAT, CLOCK_CHAT],
     {"type": "function", "function": {"name": "clock"}}, ()),
    ([PATCH], {"type": "custom", "name": "apply_patch"}, [PATCH_CHAT],
     {"type": "function", "function": {"name": "apply_patch"}}, ()),
    ([GIT], {"type": "function", "name": "clock", "namespace": "mcp__git"},
     [renamed(CLOCK_CHAT, "mcp__git__clock"), renamed(PATCH_CHAT, "mcp__git__apply_patch")],
     {"type": "function", "function": {"name": "mcp__git__clock"}}, ()),
    ([WEATHER, CLOCK, PATCH],
     {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "apply_patch"},
                                                             {"type": "function", "name": "weather"}, SEARCH]},
     [WEATHER_CHAT, PATCH_CHAT], "required", ()),
    ([WEATHER], {"type": "allowed_tools", "mode": "auto", "tools": []}, [], None, ()),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "choice", "offered", "chosen", "dropped"), CASES)
def test_tools_are_offered_as_functions(
    tools: list[Any] | None, choice: Any, offered: list[Any], chosen: Any, dropped: tuple[str, ...]
) -> None:
    read = read_tools({"tools": tools, "tool_choice": choice})
    assert (list(read.offered), read.choice, read.dropped) == (offered, chosen, dropped)


REFUSED = [
    ({"tools": {}}, "tools", "must be an array"),
    ({"tools": [5]}, "tools.0", "must be an object with a type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name", "is missing"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", "beside type, not in function"),
    ({"tools": [{**WEATHER, "parameters": "x"}]}, "tools.0.parameters", "must be an object"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [5]}]}, "tools.0.tools.0", "must be an object"),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "none, auto, required"),
    ({"tools": [WEATHER], "tool_choice": 5}, "tool_choice", "a string or an object"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "that is in tools"),
    ({"tools": [SEARCH], "tool_choice": {"type": "web_search"}}, "tool_choice", "no other kind"),
    ({"tools": [SEARCH], "tool_choice": "required"}, "tool_choice", "tools has no function"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice", "auto or required"),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSED)
def test_what_cannot_be_offered_is_refused_by_name(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequestError, match=words) as refused:
        read_tools(body)
    assert refused.value.param == param


def test_a_call_has_the_name_that_the_client_gave() -> None:
    tools = read_tools({"tools": [WEATHER, GIT]})
    assert tools.find("weather") == Tool("function", "weather")
    assert tools.find("mcp__git__apply_patch") == Tool("custom", "apply_patch", "mcp__git")
    assert tools.find("made_up") == Tool("function", "made_up")
    assert call_item(tools.find("mcp__git__apply_patch"), "ctc_1", "a", "*** Begin") == {
        "id": "ctc_1", "type": "custom_tool_call", "status": "completed", "call_id": "a", "name": "apply_patch",
        "namespace": "mcp__git", "input": "*** Begin",
    }  # fmt: skip
    assert call_item(tools.find("weather"), "fc_1", "a", "{}", "in_progress") == {
        "id": "fc_1", "type": "function_call", "status": "in_progress", "call_id": "a", "name": "weather",
        "arguments": "{}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\\nb"}', "a\nb"),
        ('{"input": "a\nb"}', "a\nb"),  # a line break that should have been escaped
        ('{"patch": "a"}', '{"patch": "a"}'),
        ('{"input": 5}', '{"input": 5}'),
        ("*** Begin Patch", "*** Begin Patch"),
        ("[" * 100_000, "[" * 100_000),
        ("", ""),
        ('{"input": "\\ud83d"}', "�"),
        (r'{"input": "rm -rf build/\.cache"}', r"rm -rf build/\.cache"),
        (r'{"input": "\d\\\d C:\users \u0041\ "}', r"\d\\d C:\users A\ "),
        ('{"input": "say "hi" to all"}', '{"input": "say "hi" to all"}'),
        ('{"input": "a"} {', '{"input": "a"} {'),
        ('{"input": "', ""),
        (r'{"input": "a\u00', "a"),
        ('{"input": "a" ', "a"),
    ],
)
def test_the_input_of_a_custom_tool(arguments: str, text: str) -> None:
    assert decode_input(arguments) == text
    assert orjson.dumps(text)


@given(st.text(), st.lists(st.integers(1, 7), min_size=1))
def test_a_text_is_decoded_while_it_arrives(text: str, sizes: list[int]) -> None:
    for arguments in (encode_input(text), json.dumps({"input": text}, ensure_ascii=True)):
        decoder, out, at = InputDecoder(), "", 0
        while at < len(arguments):
            size = sizes[at % len(sizes)]
            out += decoder.feed(arguments[at : at + size])
            assert text.startswith(out)
            at += size
        assert out == text
        assert arguments[decoder.read :] == '"}'


def test_arguments_that_begin_otherwise_wait_for_their_end() -> None:
    decoder = InputDecoder()
    assert [decoder.feed('{"other": "aaaaaaaaaaaaaaa') for _ in range(10)] == [""] * 10
    assert decoder.feed('{"input": "a"}') == ""
    assert decoder.read == 0


@given(st.text('ab\\"/nud83DE0\n', max_size=60), st.lists(st.integers(1, 7), min_size=1))
def test_a_stream_decodes_what_a_whole_answer_does(text: str, sizes: list[int]) -> None:
    """Whatever a model may leave unescaped, unless it is a quote, which ends the text."""
    arguments = f'{{"input": "{text}'
    decoder, out, at = InputDecoder(), "", 0
    while at < len(arguments):
        size = sizes[at % len(sizes)]
        out += decoder.feed(arguments[at : at + size])
        at += size
    whole = decode_input(arguments)
    assert out == whole or whole == arguments
    assert len(arguments) - decoder.read < 12 or arguments[decoder.read] == '"'
