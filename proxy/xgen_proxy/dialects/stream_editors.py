"""What is put right in a stream on its way to the client. A stream that needs nothing passes as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

import orjson

from xgen_proxy import sse
from xgen_proxy.dialects.dialect import BackendRequest, Dialect, Json, Post
from xgen_proxy.dialects.llama_cpp_python.stop_strings import StopStringCutter, stop_strings
from xgen_proxy.dialects.llama_cpp_python.token_usage import TokenCounter
from xgen_proxy.errors import UpstreamProtocolError

CREATED = re.compile(rb'"created":\d+')  # inside a JSON string its quotes would be escaped


class Editor(Protocol):
    """`done`: all that the client asked for has come, and the rest of the stream is to be cancelled."""

    @property
    def done(self) -> bool: ...

    def edit(self, block: bytes) -> bytes:
        """`block`: one or more whole SSE events, never the closing `data: [DONE]`."""

    async def finish(self, post: Post) -> bytes:
        """Events to add before `data: [DONE]`. The replica's slot is still ours. Raises UpstreamError."""


def editor_for(dialect: Dialect, request: BackendRequest) -> Editor | None:
    if dialect.name == "llama-server":
        legacy = request.features.endpoint == "completions" and "logprobs" in request.features.needs
        return LegacyLogprobs(request) if legacy else LlamaServer(request)
    if dialect.name == "llama-cpp-python":
        return LlamaCppPython(request)
    return ModelName(request) if request.alias != request.served else None


def model_names(request: BackendRequest) -> tuple[bytes, bytes]:
    """What to look for, and the public name to put there instead."""
    return b'"model":' + orjson.dumps(request.served), b'"model":' + orjson.dumps(request.alias)


def rename_model(request: BackendRequest, data: bytes) -> bytes:
    return data if request.alias == request.served else data.replace(*model_names(request))


class ModelName:
    done = False

    def __init__(self, request: BackendRequest) -> None:
        self._names = model_names(request)

    def edit(self, block: bytes) -> bytes:
        return block.replace(*self._names)

    async def finish(self, post: Post) -> bytes:
        return b""


class LlamaServer:
    """One usage, one `created`, and a role chunk also when the answer begins with a character of several tokens, such
    as an emoji: llama-server leaves it out then."""

    done = False

    def __init__(self, request: BackendRequest) -> None:
        self._request = request
        chat = request.features.endpoint == "chat"
        self._roles_to_come = set(range(request.choices)) if chat else set()
        self._holds_usage = not chat or request.choices > 1
        self._created: bytes | None = None
        self._usages: list[Json] = []
        self._last: Json = {}

    def edit(self, block: bytes) -> bytes:
        if self._holds_usage and (b'"usage":' in block or b"data: null" in block):
            block = b"".join(event(chunk) for chunk in chunks(block) if not self._hold_usage(chunk))
        if not block:
            return b""
        if self._roles_to_come:
            block = self._with_roles(block)
        return self._steady(block)

    def _steady(self, block: bytes) -> bytes:
        if self._created is None:
            created = CREATED.search(block)
            self._created = created.group() if created else b'"created":0'
        return rename_model(self._request, CREATED.sub(self._created, block))

    def _with_roles(self, block: bytes) -> bytes:
        out = []
        for one in sse.events(block):
            for chunk in chunks(one):
                first = [choice for choice in chunk["choices"] if choice["index"] in self._roles_to_come]
                self._roles_to_come -= {choice["index"] for choice in first}
                missing = [role(choice["index"]) for choice in first if "role" not in choice["delta"]]
                out += [event({**chunk, "choices": [each]}) for each in missing]
            out.append(one)
        return b"".join(out)

    def _hold_usage(self, chunk: Json) -> bool:
        """Each of several choices has its own usage, and a completion's comes with its last chunk; the sum comes at the
        end, where it was asked for. Is nothing left of the chunk?"""
        usage = chunk.pop("usage", None)
        if usage is None:
            return False
        self._usages.append(usage)
        self._last = chunk
        return not chunk["choices"]

    async def finish(self, post: Post) -> bytes:
        if not self._usages or not self._request.features.include_usage:
            return b""
        usage = joined_usage(self._usages, self._request.body.get("n") or 1)
        return self._steady(event({**self._last, "choices": [], "usage": usage}))


def role(index: int) -> Json:
    """What must come first of each choice."""
    return {"index": index, "delta": {"role": "assistant", "content": None}, "finish_reason": None}


def event(chunk: Any) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def chunks(block: bytes) -> Iterator[Json]:
    """Parsed. llama-server begins a stream for several prompts with a null. Raises UpstreamProtocolError."""
    for data in sse.payloads(block):
        if data in (b"[DONE]", b"null"):
            continue
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise UpstreamProtocolError(f"an event that is not JSON: {error}") from None
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            raise UpstreamProtocolError("an event without choices")
        yield chunk


def joined_usage(usages: list[Json], n: int) -> Json:
    """llama-server counts each choice by itself, with its prompt; `n` choices share one prompt."""
    completion = sum(usage["completion_tokens"] for usage in usages)
    prompt = sum(usage["prompt_tokens"] for usage in usages) // n
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**usages[0], **counts}


def legacy_logprobs(logprobs: Json | None, offset: int) -> Json | None:
    """Chat's shape → /v1/completions' own. `offset`: characters before this text."""
    if not logprobs or "content" not in logprobs:
        return logprobs
    tokens = logprobs["content"]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets,
    }


class LegacyLogprobs(LlamaServer):
    """llama-server sends them in chat's shape on /v1/completions too."""

    def __init__(self, request: BackendRequest) -> None:
        super().__init__(request)
        self._offsets: dict[int, int] = {}  # characters so far, of each choice

    def edit(self, block: bytes) -> bytes:
        return b"".join(event(self._repair(chunk)) for chunk in chunks(super().edit(block)))

    def _repair(self, chunk: Json) -> Json:
        for choice in chunk["choices"]:
            offset = self._offsets.get(choice["index"], 0)
            choice["logprobs"] = legacy_logprobs(choice.get("logprobs"), offset)
            self._offsets[choice["index"]] = offset + len(choice["text"])
        return chunk


class LlamaCppPython:
    """Adds the usage chunk and cuts at stop strings. Names a called function once: it repeats name and id in every
    chunk, and clients join what they get, as OpenAI's own library does."""

    def __init__(self, request: BackendRequest) -> None:
        self._request = request
        self._tally = TokenCounter(request)
        self._stops = StopStringCutter(stop_strings(request.body))
        self._named: set[int] = set()
        self._last: Json = {}

    @property
    def done(self) -> bool:
        return self._stops.done

    def edit(self, block: bytes) -> bytes:
        return b"".join(event(self._repair(cut)) for chunk in chunks(block) for cut in self._cut(chunk))

    def _cut(self, chunk: Json) -> Iterator[Json]:
        if not self.done:
            self._tally.add(chunk)
        return self._stops.cut(chunk)

    def _repair(self, chunk: Json) -> Json:
        chunk["model"] = self._request.alias
        for choice in chunk["choices"]:
            delta = choice.get("delta")
            if delta:
                choice["delta"] = self._repair_delta({key: value for key, value in delta.items() if value is not None})
        self._last = chunk
        return chunk

    def _repair_delta(self, delta: Json) -> Json:
        for call in delta.get("tool_calls") or ():
            if call["index"] in self._named:
                del call["id"], call["function"]["name"]
            self._named.add(call["index"])
        if "tool_calls" in delta and "tools" in self._request.body:
            delta.pop("function_call", None)
        return delta

    async def finish(self, post: Post) -> bytes:
        if not self._request.features.include_usage:
            return b""
        return event({**self._last, "choices": [], "usage": await self._tally.usage(post)})
