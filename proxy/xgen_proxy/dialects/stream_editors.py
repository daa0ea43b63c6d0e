"""Repairs a stream on its way to the client. A stream that needs no repair passes unparsed."""

from __future__ import annotations

from typing import Protocol

import orjson

from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.request.features import Json


class StreamEditor(Protocol):
    """`done`: the client has everything it asked for. The caller cancels the rest of the stream."""

    @property
    def done(self) -> bool: ...

    def edit(self, block: bytes) -> bytes:
        """`block`: one or more complete SSE events, never the closing `data: [DONE]`."""

    async def finish(self, post: Post) -> bytes:
        """Events to add before `data: [DONE]`, while the replica's slot is held. Raises UpstreamError."""


class ModelName:
    """Replaces the model's served name by its public one."""

    done = False

    def __init__(self, request: BackendRequest) -> None:
        self._names = model_names(request)

    def edit(self, block: bytes) -> bytes:
        return block.replace(*self._names)

    async def finish(self, post: Post) -> bytes:
        return b""


def model_names(request: BackendRequest) -> tuple[bytes, bytes]:
    """(the served name, the public name) as JSON members."""
    return b'"model":' + orjson.dumps(request.served), b'"model":' + orjson.dumps(request.alias)


def rename_model(request: BackendRequest, data: bytes) -> bytes:
    return data if request.alias == request.served else data.replace(*model_names(request))


def joined_usage(usages: list[Json], n: int) -> Json:
    """One usage for all choices. llama-server counts each choice with its prompt; `n` choices share one prompt."""
    completion = sum(usage.get("completion_tokens") or 0 for usage in usages)
    prompt = sum(usage.get("prompt_tokens") or 0 for usage in usages) // n
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**usages[0], **counts}


def legacy_logprobs(logprobs: Json | None, offset: int) -> Json | None:
    """Logprobs in the shape of /v1/completions, from chat's shape. `offset`: characters before this text."""
    if not logprobs or logprobs.get("content") is None:
        return logprobs
    tokens = logprobs["content"]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token.get("top_logprobs") or ()} for token in tokens],
        "text_offset": offsets,
    }
