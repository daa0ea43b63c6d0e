"""Collects a stream into the whole response that the backend itself would have given."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.dialects.stream_editors import joined_usage, legacy_logprobs
from xgen_proxy.errors import UpstreamOversizedError, UpstreamProtocolError
from xgen_proxy.request.features import Json

COPIED = ("id", "created", "system_fingerprint", "timings")  # from the first chunk that has them
LIMIT = 64 * 1024 * 1024  # bytes of events, some 300,000 tokens; the same as of a whole response


class StreamCollector:
    """`feed()` it complete SSE events; `result()` gives the response once every choice has its finish reason.

    `done`: the client has everything it asked for. The caller cancels the rest of the stream.
    """

    def __init__(self, request: BackendRequest) -> None:
        self.request = request
        self.chat = request.features.endpoint == "chat"
        self.head: Json = {}
        self.choices: dict[int, Choice] = {}
        self.usages: list[Json] = []
        self.usage: Json | None = None
        self.size = 0

    @property
    def done(self) -> bool:
        return False

    def feed(self, block: bytes) -> None:
        """Raises UpstreamProtocolError, and UpstreamOversizedError if the answer is longer than LIMIT."""
        self.size += len(block)
        if self.size > LIMIT:
            raise UpstreamOversizedError(f"an answer of more than {LIMIT} bytes")
        for chunk in sse.parse_chunks(sse.one_reasoning_name(block)):
            for name in COPIED:
                if chunk.get(name) is not None:
                    self.head.setdefault(name, chunk[name])
            if chunk.get("usage"):
                self.usages.append(chunk["usage"])
            for wanted in self.wanted(chunk):
                for choice in wanted["choices"]:
                    self.choices.setdefault(choice["index"], Choice()).add(choice)

    def wanted(self, chunk: Json) -> Iterable[Json]:
        """What the client is to receive of this chunk, as chunks."""
        return (chunk,)

    async def finish(self, post: Post) -> None:
        """Call it at the end of the stream. Raises UpstreamError if a choice has not finished."""
        finished = [choice.finish for choice in self.choices.values()]
        if len(finished) < self.request.choices or not all(finished) or "abort" in finished:
            raise UpstreamProtocolError("the stream ended without a finish_reason")
        self.usage = await self.final_usage(post)

    async def final_usage(self, post: Post) -> Json | None:
        return joined_usage(self.usages, self.request.body.get("n") or 1) if self.usages else None

    def encoded(self) -> bytes:
        """The whole response as JSON. Raises UpstreamProtocolError if it is nested deeper than can be written."""
        try:
            return orjson.dumps(self.result())
        except orjson.JSONEncodeError as error:
            raise UpstreamProtocolError(f"a response that cannot be written: {error}") from None

    def result(self) -> Json:
        choices = sorted(self.choices.items())
        return {
            **self.head,
            "object": "chat.completion" if self.chat else "text_completion",
            "model": self.request.alias,
            "choices": [choice.as_chat(index) if self.chat else choice.as_text(index) for index, choice in choices],
            **({} if self.usage is None else {"usage": self.usage}),
        }


class Choice:
    """The pieces of one choice, joined."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}  # content, reasoning_content, refusal, text
        self.calls: dict[int, ToolCall] = {}
        self.function_call: ToolCall | None = None
        self.has_logprobs = False  # llama-server omits the field unless asked, llama-cpp-python sends null
        self.logprobs: Json | None = None
        self.finish: str | None = None

    def add(self, choice: Json) -> None:
        self.finish = choice.get("finish_reason") or self.finish
        self.has_logprobs = self.has_logprobs or "logprobs" in choice
        self._add_logprobs(choice.get("logprobs"))
        delta = choice.get("delta") if "delta" in choice else {"text": choice.get("text")}
        for name, value in (delta or {}).items():
            if name == "tool_calls":
                for call in value or ():
                    self._add_call(call)
            elif name == "function_call" and value:
                self.function_call = self.function_call or ToolCall()
                self.function_call.add(value)
            elif name != "role" and isinstance(value, str):
                self.texts.setdefault(name, []).append(value)

    def _add_call(self, piece: Json) -> None:
        call = self.calls.setdefault(piece["index"], ToolCall())
        call.id = call.id or piece.get("id")
        call.add(piece["function"])

    def _add_logprobs(self, logprobs: Json | None) -> None:
        """Joins the lists; the other members are null."""
        if not logprobs:
            return
        if self.logprobs is None:
            self.logprobs = dict(logprobs)
            return
        for name, value in logprobs.items():
            if isinstance(value, list):
                joined = self.logprobs.get(name)
                self.logprobs[name] = joined = joined if isinstance(joined, list) else []
                joined += value

    def _text(self, name: str) -> str:
        return "".join(self.texts.get(name, ()))

    def as_chat(self, index: int) -> Json:
        called = self.calls or self.function_call
        content = self._text("content")
        message: Json = {"role": "assistant", "content": None if called and not content else content}
        for name in self.texts.keys() - {"content"}:
            message[name] = self._text(name)
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function} for _, call in sorted(self.calls.items())
            ]
        if self.function_call:
            message["function_call"] = self.function_call.function
        return {"index": index, "message": message, **self._logprobs_field(), "finish_reason": self.finish}

    def as_text(self, index: int) -> Json:
        return {"text": self._text("text"), "index": index, **self._logprobs_field(), "finish_reason": self.finish}

    def _logprobs_field(self) -> Json:
        if not self.has_logprobs:
            return {}
        return {"logprobs": legacy_logprobs(self.logprobs, 0) if "text" in self.texts else self.logprobs}


class ToolCall:
    """The name comes once or in every piece, the arguments in pieces."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.name: str | None = None
        self.arguments: list[str] = []

    def add(self, function: Json) -> None:
        self.name = self.name or function.get("name")
        self.arguments.append(function.get("arguments") or "")

    @property
    def function(self) -> Json:
        return {"name": self.name, "arguments": "".join(self.arguments)}
