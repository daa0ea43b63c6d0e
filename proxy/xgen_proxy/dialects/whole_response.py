"""Whole responses: one that a backend could only give whole, turned into the events of a stream."""

from __future__ import annotations

from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import Json


def as_events(request: BackendRequest, data: bytes) -> bytes:
    """Raises UpstreamProtocolError if `data` is not a completion."""
    try:
        answer: Json = orjson.loads(data)
        head = {name: answer[name] for name in ("id", "created", "model")}
        chat = request.features.endpoint == "chat"
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        chunks = [{**head, "choices": [part]} for choice in answer["choices"] for part in _parts(choice, chat)]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UpstreamProtocolError("the response is not a completion") from None
    if request.features.include_usage:
        chunks.append({**head, "choices": [], "usage": answer.get("usage")})
    for chunk in chunks:
        sse.check_chunk(chunk)
    return b"".join(sse.encode(chunk) for chunk in chunks)


def _parts(choice: Json, chat: bool) -> list[Json]:
    """The choice as the choices of one or two chunks."""
    index, finish = choice["index"], choice["finish_reason"]
    if not chat:
        return [choice]
    closing: dict[str, Any] = {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish}
    delta = {name: value for name, value in choice["message"].items() if value is not None}
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
    return [{"index": index, "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": None}, closing]
