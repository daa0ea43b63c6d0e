"""A Request as the relay makes it of a client's body, and chunks as the servers send them."""

from __future__ import annotations

from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.request.features import Endpoint, Json
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.parsing import parse_features

VLLM, LLAMA_SERVER, LLAMA_CPP_PYTHON, OPENAI = DIALECTS.values()
TOOLS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
}
HI = [{"role": "user", "content": "Hi"}]
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {}}]}
ANSWER = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "m",
    "choices": [{
        "index": 0,
        "message": CALLED,
        "logprobs": {"content": []},
        "finish_reason": "tool_calls",
    }],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}  # fmt: skip


def make_request(
    endpoint: Endpoint = "chat", alias: str = "m", served: str = "m", context: int | None = None, **fields: Any
) -> BackendRequest:
    least: dict[str, Any] = {"chat": {"messages": HI}, "completions": {"prompt": "One"}, "embeddings": {"input": "Hi"}}
    body = {"model": alias, **least[endpoint], **fields}
    return BackendRequest(
        parse_features(body, {}, endpoint, Limits()), body, orjson.dumps(body), alias, served, context
    )


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


def call(arguments: str) -> Json:
    """A chunk of a tool call, as llama-cpp-python sends it."""
    function = {"name": "f", "arguments": arguments}
    return delta(
        role=None, content=None, function_call=function,
        tool_calls=[{"index": 0, "id": "call_1", "type": "function", "function": dict(function)}],
    )  # fmt: skip


class Replica:
    """Answers the questions that follow a stream: one token for each character, and 37 for the prompt."""

    def __init__(self, status: int = 200, before: int = 0) -> None:
        self.status = status
        self.before = before  # tokens that the tokenizer puts before any text
        self.asked: list[tuple[str, Json]] = []

    async def post(self, path: str, body: Json) -> tuple[int, Any]:
        self.asked.append((path, body))
        if path == "/extras/tokenize/count":
            return self.status, {"count": self.before + len(body["input"])}
        return self.status, {"usage": {"prompt_tokens": 37, "completion_tokens": 1, "total_tokens": 38}}


def read(block: bytes) -> list[Json]:
    return list(sse.parse_chunks(block))
