"""Reads chat completions, whole or in chunks, as small values that a translation writes in its own words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.errors import BadGatewayError, UpstreamProtocolError
from xgen_proxy.request.features import Json
from xgen_proxy.values import frozen

# Anthropic's documentation has clients return malformed arguments under this key. No tool takes it, so a client that
# validates arguments rejects the call and tells the model.
INVALID = "INVALID_JSON"
# In the middle of a conversation a system message is written into the user's turn. Templates such as Qwen's refuse it
# there, and in the leading message it would change the beginning of the prompt, and so empty the prefix cache.
REMINDER = "<system-reminder>\n{}\n</system-reminder>"


@frozen
class Text:
    """A piece of the answer. A refusal counts as text. `logprobs`: of its tokens, if the client asked for them."""

    text: str
    logprobs: tuple[Json, ...] = ()


@frozen
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@frozen
class ToolCallPiece:
    """A piece of a tool call. The first of each `index` has the id and the name; `arguments` is a part of the JSON."""

    index: int
    id: str
    name: str
    arguments: str


@frozen
class Finish:
    """`reason`: stop, length, tool_calls, function_call or content_filter. `stop`: the stop string, if it is known."""

    reason: str
    stop: str | None = None


@frozen
class Usage:
    """In tokens. `cached` are part of `prompt`, and `reasoning` of `completion`."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


@frozen
class Failure:
    """The stream broke: the fields of OpenAI's error object."""

    error: Json


Piece = Text | Reasoning | ToolCallPiece | Finish | Usage | Failure


@frozen
class ToolCall:
    id: str
    name: str
    arguments: str


@frozen
class Answer:
    """A whole chat completion of one choice."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish: Finish
    usage: Usage
    logprobs: tuple[Json, ...] = ()


def read_pieces(events: bytes) -> Iterator[Piece]:
    """Yields the pieces in these events, in order. Comments and `[DONE]` yield none. Raises UpstreamProtocolError."""
    if sse.is_error(events):  # the proxy's own, the only event
        yield Failure(orjson.loads(next(sse.payloads(events)))["error"])
        return
    for chunk in sse.parse_chunks(events):
        for choice in chunk["choices"]:
            yield from _delta_pieces(choice.get("delta") or {}, choice)
            if choice.get("finish_reason"):
                yield Finish(choice["finish_reason"], _stop(choice))
        if chunk.get("usage"):
            yield read_usage(chunk["usage"])


def _delta_pieces(delta: Json, choice: Json) -> Iterator[Piece]:
    if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
        yield Reasoning(reasoning)
    if text := delta.get("content") or delta.get("refusal"):
        yield Text(text, _logprobs(choice))
    for call in delta.get("tool_calls") or ():
        id, function = call.get("id"), call["function"]
        yield ToolCallPiece(
            call["index"],
            id if isinstance(id, str) else "",
            function.get("name") or "",
            function.get("arguments") or "",
        )


def read_answer(data: bytes) -> Answer:
    """Raises BadGatewayError if it is not a chat completion."""
    try:
        completion = orjson.loads(data)
        sse.check_chunk(completion)
        choice = completion["choices"][0]
        message = choice["message"]
        calls = [_read_call(call) for call in message.get("tool_calls") or ()]
        return Answer(
            _text(message, "content", "refusal"),
            _text(message, "reasoning", "reasoning_content"),
            tuple(calls),
            Finish(choice.get("finish_reason") or "stop", _stop(choice)),
            read_usage(completion.get("usage") or {}),
            _logprobs(choice),
        )
    except (ValueError, LookupError, TypeError, AttributeError, UpstreamProtocolError):
        raise BadGatewayError("the backend's answer is not a chat completion", code="bad_answer") from None


def _read_call(call: Json) -> ToolCall:
    """Some servers send the arguments as an object, or null. Raises LookupError, TypeError."""
    function = call["function"]
    arguments = function["arguments"]
    written = orjson.dumps(arguments).decode() if isinstance(arguments, dict) else _text(function, "arguments")
    return ToolCall(_text(call, "id"), _text(function, "name"), written)


def _text(holder: Json, *names: str) -> str:
    """The first of these fields that is not empty. Raises TypeError if it is not a text."""
    found = next((holder[name] for name in names if holder.get(name)), "")
    if not isinstance(found, str):
        raise TypeError(f"{names[0]} is not a text")
    return found


def tool_input(arguments: str) -> orjson.Fragment:
    """The arguments of a call as an object, written as they are: parsed, integers beyond 64 bits would become floats.
    https://github.com/ijl/orjson#fragment"""
    if not arguments.strip():
        return orjson.Fragment(b"{}")
    return orjson.Fragment(arguments if is_object(arguments) else orjson.dumps({INVALID: arguments}))


def is_object(arguments: str) -> bool:
    return isinstance(_parsed(arguments), dict)


def _parsed(arguments: str) -> Any:
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return None


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Details that the engine does not report count as 0."""
    return Usage(
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
        _count(usage.get("prompt_tokens_details"), "cached_tokens"),
        _count(usage.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _count(holder: Any, name: str) -> int:
    """0 for what is not a count."""
    count = holder.get(name) if isinstance(holder, dict) else None
    return count if type(count) is int else 0


def _logprobs(choice: Json) -> tuple[Json, ...]:
    return tuple((choice.get("logprobs") or {}).get("content") or ())


def _stop(choice: Json) -> str | None:
    """vLLM's `stop_reason` is the stop string that ended the text, or the id of a token."""
    stop = choice.get("stop_reason")
    return stop if isinstance(stop, str) else None
