"""The response object and its items, and whole answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import orjson

from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import Answer, Finish, Usage
from xgen_proxy.translation.responses.logprobs import logprobs_of_text, output_logprobs
from xgen_proxy.translation.responses.tools import Tools, call_item, decode_input

Status = Literal["in_progress", "completed", "incomplete", "failed"]
WHY_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}

# Fields that the response repeats of the request, and their values where the request has none.
REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "temperature": None,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "user": None,
}

LONG = 64 * 1024  # bytes of JSON


def repeated(request: Json) -> Json:
    """What a response repeats of its request. Each event with the response has it, so long fields are left out."""
    return {
        name: value
        for name in ("reasoning", "text", *REPEATED)
        if (value := request.get(name)) is not None and len(orjson.dumps(value)) <= LONG
    }


class ResponseHead:
    """What all versions of one response object have in common: that of the first event, and that of the last."""

    def __init__(self, request: Json, model: str) -> None:
        self.key = uuid.uuid4().hex
        self.id = f"resp_{self.key}"
        self.created_at = int(time.time())
        self._fields = _fields(request, model)

    def item_id(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self.key}_{index}"

    def response(
        self,
        status: Status,
        output: Sequence[Json] = (),
        *,
        usage: Usage | None = None,
        why_incomplete: str | None = None,
        error: Json | None = None,
    ) -> Json:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": why_incomplete} if why_incomplete else None,
            "output": list(output),
            **self._fields,
            "usage": None if usage is None else usage_fields(usage),
        }


def _fields(request: Json, model: str) -> Json:
    given = {name: request[name] for name in REPEATED if request.get(name) is not None}
    reasoning, text = request.get("reasoning") or {}, request.get("text") or {}
    return {
        "model": model,
        **REPEATED,
        **given,
        "background": False,
        "conversation": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default",
        "store": False,  # nothing is kept, whatever OpenAI's own default is
        "text": {"format": {"type": "text"}, **{name: value for name, value in text.items() if value is not None}},
        "truncation": "disabled",
    }


def usage_fields(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def message_item(item_id: str, status: str, parts: Sequence[Json]) -> Json:
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": list(parts)}


def text_part(text: str, logprobs: Iterable[Json] = ()) -> Json:
    """`logprobs` as output_logprobs() gives them."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def reasoning_item(item_id: str, status: str, parts: Sequence[Json]) -> Json:
    """The model's own words are its content; there is no summary of them."""
    return {"id": item_id, "type": "reasoning", "status": status, "summary": [], "content": list(parts)}


def reasoning_part(text: str) -> Json:
    return {"type": "reasoning_text", "text": text}


def why_incomplete(finish: Finish) -> str | None:
    return WHY_INCOMPLETE.get(finish.reason)


def whole_response(head: ResponseHead, tools: Tools, answer: Answer) -> bytes:
    reason = why_incomplete(answer.finish)
    output: list[Json] = []
    if answer.reasoning:
        parts = [reasoning_part(answer.reasoning)]
        output.append(reasoning_item(head.item_id("rs", 0), "completed", parts))
    text = text_part(answer.text, output_logprobs(logprobs_of_text(answer)))
    if answer.text.strip() or not (answer.tool_calls or output):
        output.append(message_item(head.item_id("msg", len(output)), "completed", [text]))
    for call in answer.tool_calls:
        tool = tools.find(call.name)
        is_custom = tool.kind == "custom"
        item_id = head.item_id("ctc" if is_custom else "fc", len(output))
        content = decode_input(call.arguments) if is_custom else call.arguments or "{}"
        output.append(call_item(tool, item_id, call.id or f"call_{item_id}", content))
    if reason:
        output[-1]["status"] = "incomplete"
    status: Status = "incomplete" if reason else "completed"
    return orjson.dumps(head.response(status, output, usage=answer.usage, why_incomplete=reason))
