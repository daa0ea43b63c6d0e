"""RULES: what each engine needs changed in a request, or must never see. Found by running them. Pure.

A rule looks at a body and returns it, the same object where there is nothing to do. A body that no rule changes goes
out as the client's own bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from proxy.dialects import Dialect, Json, Request
from proxy.errors import BadRequest

Action = Literal["rename", "fill", "drop", "translate", "refuse"]

LEGACY_COMPLETION_TOKENS = 16  # OpenAI's default on /v1/completions


@dataclass(frozen=True, slots=True)
class Rule:
    """`hazard`: what the engine does when the rule is not applied."""

    name: str
    dialects: tuple[str, ...]
    action: Action
    hazard: str
    apply: Callable[[Json, Request], Json]


def prepare(dialect: Dialect, request: Request) -> bytes:
    """The bytes for this backend. Raises BadRequest, saying what to change."""
    body = prepared(dialect, request)
    if body is request.body and request.raw is not None:
        return request.raw
    return orjson.dumps(body)


def prepared(dialect: Dialect, request: Request) -> Json:
    body = request.body
    for rule in BY_DIALECT[dialect.name]:
        body = rule.apply(body, request)
    return body


def name_model(body: Json, request: Request) -> Json:
    return body if body.get("model") == request.served else {**body, "model": request.served}


def drop_nulls(body: Json, _: Request) -> Json:
    return {key: value for key, value in body.items() if value is not None} if None in body.values() else body


def name_max_tokens(body: Json, _: Request) -> Json:
    if "max_completion_tokens" not in body:
        return body
    body = dict(body)
    body["max_tokens"] = body.pop("max_completion_tokens")
    return body


def limit_legacy_completion(body: Json, request: Request) -> Json:
    if request.features.endpoint != "completions" or request.features.max_tokens is not None:
        return body
    return {**body, "max_tokens": LEGACY_COMPLETION_TOKENS}


def always_stream(body: Json, request: Request) -> Json:
    return body if request.features.endpoint == "embeddings" else {**body, "stream": True}


def always_usage(body: Json, request: Request) -> Json:
    """Only for what is put together here; a client's own stream gets what the client asked for."""
    if request.features.endpoint == "embeddings" or request.features.stream:
        return body
    return {**body, "stream_options": {"include_usage": True}}


def drop_stream_options(body: Json, _: Request) -> Json:
    return {key: value for key, value in body.items() if key != "stream_options"}


def no_repeat_penalty(body: Json, request: Request) -> Json:
    if "repeat_penalty" in body or request.features.endpoint == "embeddings":
        return body
    return {**body, "repeat_penalty": 1.0}


def plain_messages(body: Json, request: Request) -> Json:
    if request.features.endpoint != "chat":
        return body
    return {**body, "messages": [_plain_message(message) for message in body["messages"]]}


def _plain_message(message: Json) -> Json:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    role = "system" if message["role"] == "developer" else message["role"]
    kept = {key: value for key, value in message.items() if value is not None}
    return {**kept, "role": role, "content": content or ""}


def json_object_with_schema(body: Json, _: Request) -> Json:
    response_format = body.get("response_format")
    if not response_format or response_format.get("type") != "json_schema":
        return body
    schema = response_format["json_schema"].get("schema") or {}
    return {**body, "response_format": {"type": "json_object", "schema": schema}}


# What llama-cpp-python's converter turns into a grammar that llama.cpp parses. Anything else may come out as a broken
# grammar, and a broken grammar kills the process.
SAFE_KEYWORDS = frozenset({
    "$comment", "$defs", "$id", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "definitions",
    "deprecated", "description", "enum", "examples", "items", "nullable", "oneOf", "properties", "readOnly", "required",
    "strict", "title", "type", "writeOnly",
})  # fmt: skip
NAME_MAPS = ("properties", "$defs", "definitions")
LITERALS = ("const", "default", "enum", "examples", "required", "type", "title", "description")


def only_safe_schemas(body: Json, _: Request) -> Json:
    schema = (body.get("response_format") or {}).get("schema")
    found = [("response_format", schema)] if schema is not None else []
    found += [("tools", function.get("parameters")) for function in _functions(body)]
    for where, each in found:
        for keyword in _keywords(each):
            if keyword not in SAFE_KEYWORDS:
                raise BadRequest(f"this backend cannot enforce {keyword!r} in a JSON schema", param=where)
    return body


def _functions(body: Json) -> Iterator[Json]:
    for tool in body.get("tools") or []:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest("each tool must be {type: function, function: {name, parameters}}", param="tools")
        yield function


def _keywords(schema: Any) -> Iterator[str]:
    """Every schema keyword, at every depth; names of properties and literal values are none."""
    if isinstance(schema, list):
        for each in schema:
            yield from _keywords(each)
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        yield keyword
        if keyword in NAME_MAPS and isinstance(value, dict):
            yield from _keywords(list(value.values()))
        elif keyword not in LITERALS:
            yield from _keywords(value)


def known_tool_choice(body: Json, _: Request) -> Json:
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return body
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if name not in [function["name"] for function in _functions(body)]:
        raise BadRequest("tool_choice names a function that is not in tools", param="tool_choice")
    return body


TOOL_FIELDS = {"tools", "tool_choice", "functions", "function_call"}


def no_unforced_tools(body: Json, request: Request) -> Json:
    """tool_choice none: the model must not call any, and the templates would ignore them."""
    if "forced_tool" in request.features.needs or not body.keys() & TOOL_FIELDS:
        return body
    return {key: value for key, value in body.items() if key not in TOOL_FIELDS}


def guided_to_structured(body: Json, _: Request) -> Json:
    guided = {key: body[key] for key in GUIDED if body.get(key) is not None}
    if not guided:
        return body
    kept = {key: value for key, value in body.items() if key not in GUIDED}
    kept["structured_outputs"] = {**(body.get("structured_outputs") or {}), **{GUIDED[k]: v for k, v in guided.items()}}
    return kept


GUIDED = {"guided_json": "json", "guided_choice": "choice", "guided_regex": "regex", "guided_grammar": "grammar"}

CPP = ("llama-server", "llama-cpp-python")
PYTHON = ("llama-cpp-python",)

RULES: tuple[Rule, ...] = (
    Rule("model name", ("vllm", *CPP, "openai"), "rename", "vLLM answers 404 to a public alias", name_model),
    Rule("legacy guided_*", ("vllm",), "translate", "silently ignored: the output is not constrained",
         guided_to_structured),
    Rule("null fields", PYTHON, "drop", "500, a validation error", drop_nulls),
    Rule("max_completion_tokens", PYTHON, "rename", "ignored: generates to the end of the context, holding the lock",
         name_max_tokens),
    Rule("no max_tokens on /v1/completions", CPP, "fill", "llama-server generates to the end of the context",
         limit_legacy_completion),
    Rule("developer role, content parts, null content", PYTHON, "translate", "500, a validation error", plain_messages),
    Rule("tools with tool_choice none", PYTHON, "drop", "some templates show them to the model all the same",
         no_unforced_tools),
    Rule("json_schema", PYTHON, "translate", "500: it knows json_object with a schema", json_object_with_schema),
    Rule("schema keywords", PYTHON, "refuse", "a schema that converts to a broken grammar kills the process",
         only_safe_schemas),
    Rule("unknown tool_choice", PYTHON, "refuse", "500", known_tool_choice),
    Rule("repeat_penalty", PYTHON, "fill", "1.1 by default: answers unlike those of every other engine",
         no_repeat_penalty),
    Rule("stream: false", CPP, "fill", "a client that leaves does not stop the generation", always_stream),
    Rule("usage", ("llama-server",), "fill", "a stream has no usage unless asked", always_usage),
    Rule("stream_options", PYTHON, "drop", "ignored: we add the usage ourselves", drop_stream_options),
)  # fmt: skip

BY_DIALECT: dict[str, tuple[Rule, ...]] = {
    name: tuple(rule for rule in RULES if name in rule.dialects) for name in ("vllm", *CPP, "openai")
}
