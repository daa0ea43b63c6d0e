"""Whole responses: whether one is an answer, and one that a backend could only give whole, as events of a stream."""

from __future__ import annotations

from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.error_mapping import stream_error
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import Endpoint, Json

MAX_PARSED = 1024 * 1024  # bytes, which take some 5 ms
EDGE = 100  # bytes at the beginning and the end that may be spaces


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


def check_whole(data: bytes, endpoint: Endpoint, *, parse: bool) -> None:
    """Whether a response with status 200 is an answer, not an error, half of one, or something else.

    Its bytes are enough for an engine whose bytes are tested, and for what is too large to be parsed on the loop;
    `parse` it for any other. Raises UpstreamProtocolError, or the meaning of the error.
    """
    field = "data" if endpoint == "embeddings" else "choices"
    begins, ends = data[:EDGE].lstrip(), data[-EDGE:].rstrip()
    looks_good = begins.startswith(b"{") and ends.endswith(b"}") and not begins.startswith(b'{"error":{')
    if looks_good and (not parse or len(data) > MAX_PARSED) and b'"%b"' % field.encode() in data:
        return
    try:
        answer = orjson.loads(data) if len(data) <= MAX_PARSED else None
    except orjson.JSONDecodeError as error:
        raise UpstreamProtocolError(f"an answer that is not JSON: {error}") from None
    if not isinstance(answer, dict):
        raise UpstreamProtocolError("an answer that is no JSON object")
    if answer.get("error") or answer.get("object") == "error":
        raise stream_error(sse.encode(answer))
    found = answer.get(field)
    if not isinstance(found, list) or not (found or endpoint == "embeddings"):
        raise UpstreamProtocolError(f"an answer without {field}")
