"""What is put right in a whole answer that passes as it came. Pure."""

from __future__ import annotations

import base64
import struct
from typing import Any

import orjson

from xgen_proxy.dialects.dialect import BackendRequest, Dialect, Json
from xgen_proxy.dialects.stream_editors import event, rename_model
from xgen_proxy.errors import RequestRejectedError, UpstreamProtocolError


def repair_whole(dialect: Dialect, request: BackendRequest, data: bytes) -> bytes:
    """Raises RequestRejectedError where the backend answered something else than was asked, UpstreamProtocolError where it is no answer."""
    data = rename_model(request, data)
    if dialect.name == "llama-cpp-python" and request.features.endpoint == "embeddings":
        return _flat_embeddings(request, data)
    return data


def _flat_embeddings(request: BackendRequest, data: bytes) -> bytes:
    """It gives a vector for each token where the model has no pooling, and never base64."""
    try:
        answer = orjson.loads(data)
        vectors = [item["embedding"] for item in answer["data"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise UpstreamProtocolError("an answer that is no list of embeddings") from None
    if any(vector and isinstance(vector[0], list) for vector in vectors):
        raise RequestRejectedError(
            "this model has a vector for each token, none for the text: it is not made for embeddings"
        )
    if request.body.get("encoding_format") != "base64":
        return data
    for item in answer["data"]:
        vector = item["embedding"]
        item["embedding"] = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return orjson.dumps(answer)


def as_events(request: BackendRequest, data: bytes) -> bytes:
    """A whole answer as the events of a stream, for what a backend can only do whole. Raises UpstreamProtocolError."""
    try:
        answer: Json = orjson.loads(data)
        head = {name: answer[name] for name in ("id", "created", "model")}
        choices: list[Json] = answer["choices"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise UpstreamProtocolError("an answer that is none") from None
    chat = request.features.endpoint == "chat"
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    chunks = [{**head, "choices": [part]} for choice in choices for part in _parts(choice, chat)]
    if request.features.include_usage:
        chunks.append({**head, "choices": [], "usage": answer.get("usage")})
    return b"".join(event(chunk) for chunk in chunks)


def _parts(choice: Json, chat: bool) -> list[Json]:
    index, finish = choice["index"], choice["finish_reason"]
    if not chat:
        return [choice]
    closing: dict[str, Any] = {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish}
    delta = {name: value for name, value in choice["message"].items() if value is not None}
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
    return [{"index": index, "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": None}, closing]
