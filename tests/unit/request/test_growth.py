"""Every text and list of a request, growing up to the body limit: the time grows with it, and stays short.

What is measured is what holds the event loop: reading the body, checking it, and preparing it for each engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.growth import COUNTS, LIMITS, SIZES, TEXTS, Body, check, measured, of_texts
from tests.support.images import about, data_url, image
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.request.call import Call, Origin, parse_call
from xgen_proxy.request.features import Endpoint
from xgen_proxy.request.json_body import read_json

USER = {"role": "user", "content": "Hi"}
CHAT: Body = {"model": "m", "messages": [USER]}


def function(**fields: Any) -> Body:
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, **fields}}


def schema(value: Any) -> Body:
    return {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}}


GIF = data_url(b"GIF89a\x08\0\x08\0\0\0\0,\0\0\0\0\x08\0\x08\0\0\2")  # up to its pixels
JPEG = data_url(b"\xff\xd8\xff\xff\xff\xff")
FORCED = {"tool_choice": {"type": "function", "function": {"name": "f"}}}

# Where a text can stand.
PLACES: dict[str, Callable[[str], Body]] = {
    **{
        field: lambda text, field=field: {**CHAT, field: text}  # type: ignore[misc]
        for field in (
            "model", "user", "session_id", "prompt_cache_key", "task_type", "urgency", "backend", "fallback",
            "continuation", "stop", "tool_choice", "grammar", "json_schema", "reasoning_format", "reasoning_effort",
            "cache_salt", "chat_template", "guided_regex", "guided_json", "logit_bias_type", "max_tokens", "unknown",
        )
    },
    "content": lambda text: {**CHAT, "messages": [{"role": "user", "content": text}]},
    "a part": lambda text: {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
    "an image": lambda text: {**CHAT, "messages": about(image(text))},
    "an image's data": lambda text: {**CHAT, "messages": about(image(GIF + text[: len(text) // 4 * 4]))},
    "an image's data, no image": lambda text: {**CHAT, "messages": about(image(JPEG + text[: len(text) // 4 * 4]))},
    "audio": lambda text: {**CHAT, "messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}]}]},
    "a part's type": lambda text: {**CHAT, "messages": [{"role": "user", "content": [{"type": text}]}]},
    "role": lambda text: {**CHAT, "messages": [{"role": text, "content": "Hi"}]},
    "name": lambda text: {**CHAT, "messages": [{**USER, "name": text}]},
    "tool_call_id": lambda text: {**CHAT, "messages": [{"role": "tool", "content": "", "tool_call_id": text}]},
    "arguments": lambda text: {**CHAT, "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": text}}]}]},
    "a function's name": lambda text: {**CHAT, **FORCED, "tools": [function(name=text)]},
    "a chosen name": lambda text: {**CHAT, "tools": [function()], "tool_choice": {"function": {"name": text}}},
    "a description": lambda text: {**CHAT, **FORCED, "tools": [function(description=text)]},
    "a stop string": lambda text: {**CHAT, "stop": ["a", text]},
    "a key of logit_bias": lambda text: {**CHAT, "logit_bias": {text: 1}},
    "a format's type": lambda text: {**CHAT, "response_format": {"type": text}},
    "a schema's name": lambda text: {**CHAT, "response_format": {"type": "json_schema", "json_schema": {
        "name": text, "schema": {}}}},
    "a pattern": lambda text: schema({"type": "string", "pattern": text}),
    "a reference": lambda text: schema({"$ref": "#/" + text}),
    "a value of an enum": lambda text: schema({"enum": [text]}),
    "a property": lambda text: schema({"type": "object", "properties": {text: {"type": "string"}}}),
    "a required property": lambda text: schema({"type": "object", "properties": {}, "required": [text]}),
    "a keyword": lambda text: schema({text: 1}),
    "a type": lambda text: schema({"type": text}),
    "a schema as text": lambda text: {**CHAT, "structured_outputs": {"json": text}},
    "a field": lambda text: {**CHAT, text: 1},
    "prompt": lambda text: {"model": "m", "prompt": text},
    "one of the prompts": lambda text: {"model": "m", "prompt": ["a", text]},
    "suffix": lambda text: {"model": "m", "prompt": "a", "suffix": text},
    "input": lambda text: {"model": "m", "input": text},
    "one of the inputs": lambda text: {"model": "m", "input": ["a", text]},
}  # fmt: skip


def many(each: Any, count: int) -> list[Any]:
    return [each] * count


def chain(count: int) -> Body:
    """References that lead to each other, to an end."""
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count)}
    return schema({"$defs": {**links, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"})


def wide(count: int, shared: Any) -> Body:
    """Many references to one large schema."""
    return schema({"$defs": {"a": shared}, "anyOf": many({"$ref": "#/$defs/a"}, count)})


def nest(count: int) -> Body:
    """Each level refers twice to the next."""
    pair = {f"d{n}": {"anyOf": many({"$ref": f"#/$defs/d{n + 1}"}, 2)} for n in range(count)}
    return schema({"$defs": {**pair, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"})


def enum(count: int, length: int) -> Body:
    return {"enum": many("x" * length, count)}


PROPERTIES = {"properties": {f"p{n}": {} for n in range(400)}, "required": many("p1", 400)}

# What there can be many of. Called with growing numbers.
LISTS: dict[str, Callable[[int], Body]] = {
    "messages": lambda count: {**CHAT, "messages": many(USER, count)},
    "wrong messages": lambda count: {**CHAT, "messages": many({**USER, "name": 5}, count)},
    "parts": lambda count: {**CHAT, "messages": [{**USER, "content": many({"type": "text", "text": "a"}, count)}]},
    "images": lambda count: {**CHAT, "messages": [{**USER, "content": many(image(), min(count, LIMITS.images))}]},
    "too many images": lambda count: {**CHAT, "messages": [{**USER, "content": many(image(), count)}]},
    "files": lambda count: {**CHAT, "messages": [{**USER, "content": many({"type": "file", "file": {}}, count)}]},
    "calls": lambda count: {**CHAT, "messages": [{**USER, "tool_calls": many({"id": 5}, count)}]},
    "tools": lambda count: {**CHAT, "tools": many(function(), count)},
    "forced tools": lambda count: {**CHAT, **FORCED, "tools": many(function(), count)},
    "wrong tools": lambda count: {**CHAT, **FORCED, "tools": [function(), *many({}, count)]},
    "allowed tools": lambda count: {**CHAT, "tools": many(function(), 300), "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": many(function(), count)}}},
    "stop": lambda count: {**CHAT, "stop": [f"a{n}" for n in range(count)]},
    "logit_bias": lambda count: {**CHAT, "logit_bias": {f"a{n}": "x" for n in range(count)}},
    "bad_words": lambda count: {**CHAT, "bad_words": many("a", count)},
    "enum": lambda count: schema({"enum": many("a", count)}),
    "anyOf": lambda count: schema({"anyOf": many({"type": "string"}, count)}),
    "a chain of references": chain,
    "references to a large enum": lambda count: wide(count, enum(900, 1)),
    "references to long texts": lambda count: wide(count, enum(1, 5000)),
    "references to a large object": lambda count: wide(count, PROPERTIES),
    "references to references": nest,
    "schemas": lambda count: {**CHAT, "tools": many(function(), count), "functions": many(function(), count)},
    "prompts": lambda count: {"model": "m", "prompt": many("a", count)},
    "choices of prompts": lambda count: {"model": "m", "prompt": many("a", count), "n": 128},
    "token ids": lambda count: {"model": "m", "prompt": many(1, count)},
    "prompts of token ids": lambda count: {"model": "m", "prompt": many([1], count)},
    "inputs": lambda count: {"model": "m", "input": many("a", count)},
    "inputs of token ids": lambda count: {"model": "m", "input": many([1], count)},
    "fields": lambda count: {**CHAT, **{f"f{n}": None for n in range(count)}},
    "hints": lambda count: {**CHAT, "session_id": many("a", count)},
    "metadata": lambda count: {**CHAT, "metadata": {f"f{n}": 1.0 for n in range(count)}},
}  # fmt: skip


def once(raw: bytes, endpoint: Endpoint) -> float:
    """Of reading, parsing, and preparing for the slowest engine."""

    def parsed() -> Call:
        body = read_json(raw, {}, LIMITS)
        return parse_call(
            Origin("id", {}), endpoint, raw, body, limits=LIMITS, continuation=True, default_model=lambda: "m"
        )

    parsing, call = measured(parsed)
    if call is None:
        return parsing
    request = BackendRequest(call.features, call.body, call.raw, call.model, "served", 8192)
    return parsing + max(measured(lambda: dialect.prepare(request))[0] for dialect in DIALECTS.values())  # noqa: B023


def endpoint_of(body: Body) -> Endpoint:
    return "embeddings" if "input" in body else "completions" if "prompt" in body else "chat"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("place", PLACES)
def test_no_text_holds_the_loop(place: str, text: str) -> None:
    endpoint = endpoint_of(PLACES[place](""))
    check(of_texts(PLACES[place], text), SIZES, lambda raw: once(raw, endpoint))


@pytest.mark.parametrize("what", LISTS)
def test_no_list_holds_the_loop(what: str) -> None:
    endpoint = endpoint_of(LISTS[what](1))
    check([LISTS[what](count) for count in COUNTS], COUNTS, lambda raw: once(raw, endpoint))
