"""Check that a non-streaming answer or a stream is complete, as a client that trusts nothing would. Pure functions."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]
GOOD_FINISH = ("stop", "length")
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # tokens of the chat template, never part of an answer


def judge_whole(status: int, body: bytes, request: Json) -> str:
    """What is wrong with a non-streaming answer; empty if it is complete."""
    if status != 200:
        return f"{status}: {body[:300].decode(errors='replace')}"
    try:
        answer = json.loads(body)
        choices = answer["choices"]
        texts = [text_of(choice) for choice in choices]
        finishes = [choice["finish_reason"] for choice in choices]
        spent = answer["usage"]["completion_tokens"]
    except (ValueError, LookupError, TypeError) as error:
        return f"malformed: {error!r}"
    return wrong_finish(finishes) or wrong_text("".join(texts)) or wrong_usage(spent, request)


def judge_stream(status: int, body: bytes, request: Json) -> str:
    """What is wrong with a stream; empty if it is complete. `body`: all bytes, after transfer decoding."""
    if status != 200:
        return f"{status}: {body[:300].decode(errors='replace')}"
    try:
        events = events_of(body)
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        if any("error" in chunk for chunk in chunks):
            return f"error event: {next(chunk for chunk in chunks if 'error' in chunk)['error'].get('message')}"
        return wrong_order(events, body) or wrong_chunks(chunks, request)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"malformed: {error!r}"


def events_of(body: bytes) -> list[str]:
    """The data of each event. Raises ValueError if a line is neither data nor a comment."""
    events = []
    for block in body.decode().replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if any(not line.startswith("data: ") for line in lines):
            raise ValueError(f"a line that is no event: {block[:100]!r}")
        if lines:
            events.append("\n".join(line.removeprefix("data: ") for line in lines))
    return events


def wrong_order(events: list[str], body: bytes) -> str:
    if events.count("[DONE]") != 1:
        return f"[DONE] came {events.count('[DONE]')} times"
    if events[-1] != "[DONE]":
        return "events after [DONE]"
    return "" if body.endswith(b"\n\n") else "the last event is cut"


def wrong_chunks(chunks: list[Json], request: Json) -> str:
    for name in ("id", "created", "model", "object"):
        values = {str(chunk[name]) for chunk in chunks}
        if len(values) != 1:
            return f"{len(values)} different values of {name}"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    roles = sum(1 for choice in choices if choice.get("delta", {}).get("role"))
    if roles != ("messages" in request):
        return f"{roles} role chunks"
    finishes = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    text = "".join(text_of(choice) for choice in choices)
    return wrong_finish(finishes) or wrong_text(text) or wrong_usage_chunk(chunks, request)


def wrong_finish(finishes: list[Any]) -> str:
    if len(finishes) != 1:
        return f"{len(finishes)} finish_reasons"
    return "" if finishes[0] in GOOD_FINISH else f"finish_reason {finishes[0]}"


def wrong_text(text: str) -> str:
    return next((f"{token} in the text" for token in CONTROL if token in text), "")


def wrong_usage_chunk(chunks: list[Json], request: Json) -> str:
    """If requested, usage comes once, in the last chunk, which has nothing else."""
    with_usage = [chunk for chunk in chunks if chunk.get("usage")]
    if not (request.get("stream_options") or {}).get("include_usage"):
        return ""
    if len(with_usage) != 1 or with_usage[0] is not chunks[-1] or with_usage[0]["choices"]:
        return f"{len(with_usage)} usage chunks, or not in a chunk of its own at the end"
    return wrong_usage(with_usage[0]["usage"]["completion_tokens"], request)


def wrong_usage(spent: int, request: Json) -> str:
    return "" if 0 <= spent <= request["max_tokens"] else f"{spent} tokens of {request['max_tokens']} asked for"


def text_of(choice: Json) -> str:
    part = choice.get("delta") or choice.get("message") or choice
    return part.get("content") or part.get("text") or ""
