"""A stream put together to the whole answer that the backend itself would have given."""

from __future__ import annotations

from typing import Any

from xgen_proxy.dialects.dialect import BackendRequest, Dialect, Json, Post
from xgen_proxy.dialects.llama_cpp_python.stop_strings import StopStringCutter, stop_strings
from xgen_proxy.dialects.llama_cpp_python.token_usage import TokenCounter
from xgen_proxy.dialects.stream_editors import chunks, joined_usage, legacy_logprobs
from xgen_proxy.errors import UpstreamProtocolError

COPIED = ("id", "created", "system_fingerprint", "timings")  # of the first chunk that has them


class StreamCollector:
    """Fed whole SSE events; result() gives the answer once every choice has its finish_reason."""

    def __init__(self, dialect: Dialect, request: BackendRequest) -> None:
        self.request = request
        self.chat = request.features.endpoint == "chat"
        self.head: Json = {}
        self.choices: dict[int, Choice] = {}
        self.usages: list[Json] = []
        self.usage: Json | None = None
        self.tally = TokenCounter(request) if dialect.tokenize else None
        self.stops = StopStringCutter(stop_strings(request.body) if dialect.tokenize else ())

    @property
    def done(self) -> bool:
        """Has a stop string come, so that the rest of the stream is to be cancelled?"""
        return self.stops.done

    def feed(self, block: bytes) -> None:
        for chunk in chunks(block):
            for name in COPIED:
                if chunk.get(name) is not None:
                    self.head.setdefault(name, chunk[name])
            if chunk.get("usage"):
                self.usages.append(chunk["usage"])
            if self.tally is not None and not self.done:
                self.tally.add(chunk)
            for cut in self.stops.cut(chunk):
                for choice in cut["choices"]:
                    self.choices.setdefault(choice["index"], Choice()).add(choice)

    async def finish(self, post: Post) -> None:
        """Asks for what the stream did not have. Raises UpstreamError."""
        self._check()
        if self.tally is not None:
            self.usage = await self.tally.usage(post)
        elif self.usages:
            self.usage = joined_usage(self.usages, self.request.body.get("n") or 1)

    def _check(self) -> None:
        finished = [choice.finish for choice in self.choices.values()]
        if len(finished) < self.request.choices or not all(finished) or "abort" in finished:
            raise UpstreamProtocolError("the stream ended without a finish_reason")

    def result(self) -> Json:
        order = sorted(self.choices)
        return {
            **self.head,
            "object": "chat.completion" if self.chat else "text_completion",
            "model": self.request.alias,
            "choices": [self.choices[index].as_chat(index) if self.chat else self.choices[index].as_text(index)
                        for index in order],
            **({} if self.usage is None else {"usage": self.usage}),
        }  # fmt: skip


class Choice:
    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}  # content, reasoning_content, refusal, text
        self.calls: dict[int, Json] = {}
        self.function_call: Json | None = None
        self.tells_logprobs = False  # llama-server leaves the field out unless asked, llama-cpp-python has null
        self.logprobs: Json | None = None
        self.finish: str | None = None

    def add(self, choice: Json) -> None:
        self.finish = choice.get("finish_reason") or self.finish
        self.tells_logprobs = self.tells_logprobs or "logprobs" in choice
        self._add_logprobs(choice.get("logprobs"))
        delta = choice.get("delta") if "delta" in choice else {"text": choice.get("text")}
        for name, value in (delta or {}).items():
            if name == "tool_calls":
                for call in value or ():
                    self._add_call(call)
            elif name == "function_call" and value:
                self.function_call = _join_call(self.function_call or {}, value)
            elif name != "role" and isinstance(value, str):
                self.texts.setdefault(name, []).append(value)

    def _add_call(self, piece: Json) -> None:
        call = self.calls.setdefault(piece.get("index", 0), {"id": None, "type": "function", "function": {}})
        call["id"] = call["id"] or piece.get("id")
        call["function"] = _join_call(call["function"], piece.get("function") or {})

    def _add_logprobs(self, logprobs: Json | None) -> None:
        """Lists are joined; all there is beside them is null."""
        if not logprobs:
            return
        if self.logprobs is None:
            self.logprobs = dict(logprobs)
            return
        for name, value in logprobs.items():
            if isinstance(value, list):
                self.logprobs[name] = (self.logprobs.get(name) or []) + value

    def _text(self, name: str) -> str:
        return "".join(self.texts.get(name, ()))

    def as_chat(self, index: int) -> Json:
        called = self.calls or self.function_call
        content = self._text("content")
        message: Json = {"role": "assistant", "content": None if called and not content else content}
        for name in self.texts.keys() - {"content"}:
            message[name] = self._text(name)
        if self.calls:
            message["tool_calls"] = [self.calls[number] for number in sorted(self.calls)]
        if self.function_call:
            message["function_call"] = self.function_call
        return {"index": index, "message": message, **self._told_logprobs(), "finish_reason": self.finish}

    def as_text(self, index: int) -> Json:
        return {"text": self._text("text"), "index": index, **self._told_logprobs(), "finish_reason": self.finish}

    def _told_logprobs(self) -> Json:
        if not self.tells_logprobs:
            return {}
        return {"logprobs": legacy_logprobs(self.logprobs, 0) if "text" in self.texts else self.logprobs}


def _join_call(call: dict[str, Any], piece: dict[str, Any]) -> dict[str, Any]:
    """The name comes once, or in every piece; the arguments come in pieces."""
    return {
        "name": call.get("name") or piece.get("name"),
        "arguments": (call.get("arguments") or "") + (piece.get("arguments") or ""),
    }
