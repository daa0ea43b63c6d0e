"""Reads chat completions, whole or in chunks, as small values that a translation writes in its own words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.errors import BadGatewayError
from xgen_proxy.request.features import Json
from xgen_proxy.values import frozen

# The key under which Anthropic's documentation asks clients to return arguments that are not JSON. No tool has it, so
# that a client that checks arguments refuses to run the call and tells the model.
INVALID = "INVALID_JSON"


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
    """What these events of a stream say, in order. Comments and `[DONE]` say nothing. Raises UpstreamProtocolError."""
    if sse.is_error(events):
        yield from _pieces_and_failure(events)
        return
    for chunk in sse.parse_chunks(events):
        for choice in chunk["choices"]:
            yield from _delta_pieces(choice.get("delta") or {}, choice)
            if choice.get("finish_reason"):
                yield Finish(choice["finish_reason"], _stop(choice))
        if chunk.get("usage"):
            yield read_usage(chunk["usage"])


def _pieces_and_failure(events: bytes) -> Iterator[Piece]:
    for data in sse.payloads(events):
        if not data.startswith(b'{"error"'):
            yield from read_pieces(b"data: " + data + b"\n\n")
            continue
        error = orjson.loads(data)["error"]
        yield Failure(error if isinstance(error, dict) else {"message": str(error)})


def _delta_pieces(delta: Json, choice: Json) -> Iterator[Piece]:
    if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
        yield Reasoning(reasoning)
    if text := delta.get("content") or delta.get("refusal"):
        yield Text(text, _logprobs(choice))
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        yield ToolCallPiece(
            call.get("index") or 0, call.get("id") or "", function.get("name") or "", function.get("arguments") or ""
        )


def read_answer(data: bytes) -> Answer:
    """Raises BadGatewayError if it is not a chat completion."""
    try:
        completion = orjson.loads(data)
        choice = completion["choices"][0]
        message = choice["message"]
        calls = [
            ToolCall(call.get("id") or "", call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ]
        return Answer(
            message.get("content") or message.get("refusal") or "",
            message.get("reasoning") or message.get("reasoning_content") or "",
            tuple(calls),
            Finish(choice.get("finish_reason") or "stop", _stop(choice)),
            read_usage(completion.get("usage") or {}),
            _logprobs(choice),
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BadGatewayError("the backend's answer is not a chat completion", code="bad_answer") from None


def tool_input(arguments: str) -> Json:
    """The arguments of a call as an object."""
    if not arguments.strip():
        return {}
    try:
        found = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {INVALID: arguments}
    return found if isinstance(found, dict) else {INVALID: arguments}


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Details that the engine does not report count as 0."""
    prompt_details = usage.get("prompt_tokens_details") or {}
    completion_details = usage.get("completion_tokens_details") or {}
    return Usage(
        usage.get("prompt_tokens") or 0,
        usage.get("completion_tokens") or 0,
        prompt_details.get("cached_tokens") or 0,
        completion_details.get("reasoning_tokens") or 0,
    )


def _logprobs(choice: Json) -> tuple[Json, ...]:
    return tuple((choice.get("logprobs") or {}).get("content") or ())


def _stop(choice: Json) -> str | None:
    """vLLM's `stop_reason` is the stop string that ended the text, or the id of a token."""
    stop = choice.get("stop_reason")
    return stop if isinstance(stop, str) else None
