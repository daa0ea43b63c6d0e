"""A Request as the relay makes it of a client's body, and chunks as the servers send them."""

from __future__ import annotations

from typing import Any

import orjson

from xgen_proxy.config.settings import Limits
from xgen_proxy.dialects.dialect import BackendRequest, Json
from xgen_proxy.request.features import Endpoint, read_features

HI = [{"role": "user", "content": "Hi"}]


def make_request(
    endpoint: Endpoint = "chat", alias: str = "m", served: str = "m", context: int | None = None, **fields: Any
) -> BackendRequest:
    least: dict[str, Any] = {"chat": {"messages": HI}, "completions": {"prompt": "One"}, "embeddings": {"input": "Hi"}}
    body = {"model": alias, **least[endpoint], **fields}
    return BackendRequest(read_features(body, {}, endpoint, Limits()), body, orjson.dumps(body), alias, served, context)


def events(*chunks: Json) -> bytes:
    return b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)


def delta(finish: str | None = None, index: int = 0, **content: Any) -> Json:
    """A chunk of a chat."""
    choice = {"index": index, "delta": content, "logprobs": None, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": [choice]}


def text(piece: str, finish: str | None = None, index: int = 0, logprobs: Json | None = None) -> Json:
    """A chunk of a completion."""
    choice = {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": finish}
    return {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m", "choices": [choice]}
