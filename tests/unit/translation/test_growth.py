"""Requests of other APIs, growing up to the body limit: translating one takes no longer than its size allows.

What is measured is what holds the event loop: reading the body, translating it, and checking the chat. Twice a chat's
time is allowed, since all is written once more. And the memory that is left of a long name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from tests.support.growth import COUNTS, LIMITS, SIZES, STALL, TEXTS, Body, check, measured, of_texts
from tests.support.requests import make_call
from xgen_proxy.api.translated import read_limited_body
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.call import Call, Origin, parse_call
from xgen_proxy.translation.chat import Piece, Text, ToolCallPiece
from xgen_proxy.translation.messages.api import MessagesApi
from xgen_proxy.translation.responses.api import ResponsesApi
from xgen_proxy.translation.responses.tools import read_tools
from xgen_proxy.translation.translation import Api

MESSAGES: Body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
RESPONSES: Body = {"model": "m", "input": "Hi"}


def messages(*turns: Any, **fields: Any) -> Body:
    return {**MESSAGES, "messages": [*MESSAGES["messages"], *turns], **fields}


def blocks(role: str, *content: Any) -> Body:
    return messages({"role": role, "content": [*content]})


def items(*given: Any) -> Body:
    return {**RESPONSES, "input": [{"role": "user", "content": "Hi"}, *given]}


def tool(name: str = "f", **fields: Any) -> Body:
    return {"name": name, "input_schema": {"type": "object"}, **fields}


def function(name: str = "f", **fields: Any) -> Body:
    return {"type": "function", "name": name, "parameters": {"type": "object"}, **fields}


def use(**fields: Any) -> Body:
    return {"type": "tool_use", "id": "a", "name": "f", "input": {}, **fields}


def call(arguments: str) -> Body:
    return {"type": "function_call", "call_id": "a", "name": "f", "arguments": arguments}


BILLING = "x-anthropic-billing-header: "
DATA = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}

PLACES: dict[str, Callable[[str], Body]] = {
    "messages: text": lambda text: blocks("user", {"type": "text", "text": text}),
    "messages: system": lambda text: {**MESSAGES, "system": text},
    "messages: attribution": lambda text: {**MESSAGES, "system": f"{BILLING}{text}=1;"},
    "messages: pairs": lambda text: {**MESSAGES, "system": BILLING + "a=;" * (len(text) // 3)},
    "messages: user_id": lambda text: {**MESSAGES, "metadata": {"user_id": text}},
    "messages: sessions": lambda text: {**MESSAGES, "metadata": {"user_id": "_session_" * (len(text) // 9)}},
    "messages: JSON in user_id": lambda text: {**MESSAGES, "metadata": {
        "user_id": '{"a":[' + "[]," * (len(text) // 3)}},
    "messages: thinking": lambda text: blocks("assistant", {"type": "thinking", "thinking": text}),
    "messages: input": lambda text: blocks("assistant", use(input={"a": text})),
    "messages: result": lambda text: blocks("user", {"type": "tool_result", "tool_use_id": "a", "content": text}),
    "messages: data": lambda text: blocks("user", {"type": "image", "source": {**DATA, "data": text}}),
    "messages: a tool's name": lambda text: {**MESSAGES, "tools": [tool(text)]},
    "messages: a block's type": lambda text: blocks("user", {"type": text}),
    "messages: a field": lambda text: {**MESSAGES, text: 1},
    "responses: input": lambda text: {**RESPONSES, "input": text},
    "responses: instructions": lambda text: {**RESPONSES, "instructions": text},
    "responses: arguments": lambda text: items(call(text)),
    "responses: JSON in arguments": lambda text: items(call('{"a":[' + "[]," * (len(text) // 3) + "[]]}")),
    "responses: output": lambda text: items({"type": "function_call_output", "call_id": "a", "output": text}),
    "responses: custom input": lambda text: items(
        {"type": "custom_tool_call", "call_id": "a", "name": "f", "input": text}),
    "responses: file": lambda text: items({"role": "user", "content": [{"type": "input_file", "file_data": text}]}),
    "responses: a tool's name": lambda text: {**RESPONSES, "tools": [function(text)]},
    "responses: a namespace": lambda text: {**RESPONSES, "tools": [
        {"type": "namespace", "name": text, "tools": [function()] * 500}]},
    "responses: a grammar": lambda text: {**RESPONSES, "tools": [
        {"type": "custom", "name": "f", "format": {"type": "grammar", "definition": text}}]},
    "responses: an item's type": lambda text: items({"type": text}),
}  # fmt: skip

LONG = "x" * 8_000_000
LISTS: dict[str, Callable[[int], Body]] = {
    "messages: turns": lambda count: messages(*[{"role": "user", "content": "x"}] * count),
    "messages: turns of the assistant": lambda count: messages(
        {"role": "assistant", "content": LONG}, *[{"role": "assistant", "content": "x"}] * min(count, 50_000)),
    "messages: thoughts": lambda count: messages(
        *[{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}] * min(count, 20_000)),
    "messages: calls": lambda count: messages(*[{"role": "assistant", "content": [use()]}] * min(count, 20_000)),
    "messages: texts": lambda count: blocks("user", *[{"type": "text", "text": "x"}] * min(count, 45_000)),
    "messages: texts of the assistant": lambda count: blocks(
        "assistant", *[{"type": "text", "text": "x"}] * min(count, 45_000)),
    "messages: results": lambda count: blocks(
        "user", *[{"type": "tool_result", "tool_use_id": "a", "content": "x"}] * min(count, 35_000)),
    "messages: systems": lambda count: messages(*[{"role": "system", "content": "x"}] * count),
    "messages: tools": lambda count: {**MESSAGES, "tools": [tool(f"f{n}") for n in range(min(count, 30_000))]},
    "messages: stops": lambda count: {**MESSAGES, "stop_sequences": ["a"] * count},
    "messages: fields": lambda count: {**MESSAGES, **{f"f{n}": 1 for n in range(min(count, 250))}},
    "responses: items": lambda count: items(*[{"role": "user", "content": "x"}] * count),
    "responses: turns of the assistant": lambda count: items(*[{"role": "assistant", "content": "x"}] * count),
    "responses: calls": lambda count: items(*[call("{}")] * min(count, 35_000)),
    "responses: calls with values": lambda count: items(*[call("[" * 200)] * min(count, 20_000)),
    "responses: outputs": lambda count: items(
        *[{"type": "function_call_output", "call_id": "a", "output": "x"}] * min(count, 35_000)),
    "responses: thoughts": lambda count: items(
        *[{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}] * min(count, 20_000)),
    "responses: parts": lambda count: items(
        {"role": "user", "content": [{"type": "input_text", "text": "x"}] * min(count, 45_000)}),
    "responses: tools": lambda count: {**RESPONSES, "tools": [function(f"f{n}") for n in range(min(count, 28_000))]},
    "responses: tools of a namespace": lambda count: {**RESPONSES, "tools": [
        {"type": "namespace", "name": "n", "tools": [function(f"f{n}") for n in range(min(count, 28_000))]}]},
    "responses: allowed tools": lambda count: {
        **RESPONSES, "tools": [function(f"f{n}") for n in range(min(count, 1_900))],
        "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "z"}] * min(count, 40_000)}},
    "responses: allowed tools of a namespace": lambda count: {
        **RESPONSES,
        "tools": [{"type": "namespace", "name": f"n{n}", "tools": [function()]} for n in range(min(count, 1_900))],
        "tool_choice": {"type": "allowed_tools", "tools": [
            {"type": "function", "name": "f", "namespace": "z"}] * min(count, 30_000)}},
}  # fmt: skip


def once(raw: bytes, api: Api) -> float:
    def parsed() -> Call:
        body = api.translate(read_limited_body(raw, {}, LIMITS)).body
        return parse_call(
            Origin("id", {}),
            "chat",
            orjson.dumps(body),
            body,
            limits=LIMITS,
            continuation=True,
            default_model=lambda: "m",
        )

    return measured(parsed)[0]


def api_of(name: str) -> Api:
    return MessagesApi(lambda: True) if name.startswith("messages") else ResponsesApi()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("place", PLACES)
def test_no_text_holds_the_loop(place: str, text: str) -> None:
    api = api_of(place)
    check(of_texts(PLACES[place], text), SIZES, lambda raw: once(raw, api), 2 * STALL)


@pytest.mark.parametrize("what", LISTS)
def test_no_list_holds_the_loop(what: str) -> None:
    api = api_of(what)
    check([LISTS[what](count) for count in COUNTS], COUNTS, lambda raw: once(raw, api), 2 * STALL)


PATCH = ToolCallPiece(0, "a", "patch", '{"input": "')
CUSTOM = {"input": "Hi", "tools": [{"type": "custom", "name": "patch"}]}
PIECES = (100, 1_000, 10_000)
STREAMS: dict[str, tuple[list[Piece], Piece]] = {  # how it begins, and what follows again and again
    "white space": ([], Text(" " * 100)),
    "text": ([], Text("x" * 100)),
    "a custom call": ([PATCH], ToolCallPiece(0, "", "", r"\d" * 50)),
    "a malformed custom call": ([PATCH], ToolCallPiece(0, "", "", '"' * 100)),
    "halves of a character": ([PATCH], ToolCallPiece(0, "", "", r"\ud83d" * 16)),
    "calls that alternate": (
        [ToolCallPiece(0, "a", "f", "["), ToolCallPiece(1, "b", "f", "[")], ToolCallPiece(0, "", "", "1," * 50)),
}  # fmt: skip


@pytest.mark.parametrize("api", [MessagesApi(lambda: True), ResponsesApi()], ids=["messages", "responses"])
@pytest.mark.parametrize("what", STREAMS)
def test_no_stream_takes_longer_than_its_size_allows(what: str, api: Api) -> None:
    begin, piece = STREAMS[what]
    translation = api.translate({**MESSAGES, **CUSTOM} if isinstance(api, ResponsesApi) else MESSAGES)

    def once_for(raw: bytes) -> float:
        stream = translation.stream(make_call(model="m"))

        def play() -> None:
            for each in (*begin, *[piece] * int(raw)):
                stream.feed(each)
            stream.end()

        return measured(play)[0]

    check(list(PIECES), PIECES, once_for, 20 * STALL)


def test_a_namespaces_name_is_not_multiplied() -> None:
    """Each of its tools would have a copy of it: 2,000 of 5 MB are 10 GB."""
    tools = [{"type": "namespace", "name": "x" * 257, "tools": [function()]}]
    with pytest.raises(BadRequestError, match=r"tools\.0\.name has 257 characters; the limit is 256"):
        read_tools({"tools": tools})
    largest = read_tools({"tools": [{**tools[0], "name": "x" * 256}]})
    assert sys.getsizeof(largest.offered[0]["function"]["name"]) < 400
