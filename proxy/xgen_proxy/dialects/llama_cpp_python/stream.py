"""llama-cpp-python's streams: repaired on their way to the client, or collected into a whole response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.dialects.llama_cpp_python.stop_strings import StopStringCutter, stop_strings
from xgen_proxy.dialects.llama_cpp_python.token_usage import TokenCounter
from xgen_proxy.dialects.stream_collector import StreamCollector
from xgen_proxy.request.features import Json


class LlamaCppPythonEditor:
    """Adds the usage chunk, cuts at stop strings, and names a called function once.

    llama-cpp-python repeats name and id in every chunk, and clients such as OpenAI's own library join them.
    """

    def __init__(self, request: BackendRequest, counter: TokenCounter) -> None:
        self._request = request
        self._counter = counter
        self._stops = StopStringCutter(stop_strings(request.body))
        self._named: set[int] = set()
        self._last: Json = {}

    @property
    def done(self) -> bool:
        return self._stops.done

    def edit(self, block: bytes) -> bytes:
        return b"".join(sse.encode(self._repair(cut)) for chunk in sse.parse_chunks(block) for cut in self._cut(chunk))

    def _cut(self, chunk: Json) -> Iterator[Json]:
        if not self.done:
            self._counter.add(chunk)
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
                call.pop("id", None)
                call["function"].pop("name", None)
            self._named.add(call["index"])
        if "tool_calls" in delta and "tools" in self._request.body:
            delta.pop("function_call", None)
        return delta

    async def finish(self, post: Post) -> bytes:
        if not self._request.features.include_usage:
            return b""
        return sse.encode({**self._last, "choices": [], "usage": await self._counter.usage(post)})


class LlamaCppPythonCollector(StreamCollector):
    """Cuts at stop strings and counts the tokens."""

    def __init__(self, request: BackendRequest, counter: TokenCounter) -> None:
        super().__init__(request)
        self._counter = counter
        self._stops = StopStringCutter(stop_strings(request.body))

    @property
    def done(self) -> bool:
        return self._stops.done

    def wanted(self, chunk: Json) -> Iterable[Json]:
        if not self.done:
            self._counter.add(chunk)
        return self._stops.cut(chunk)

    async def final_usage(self, post: Post) -> Json:
        return await self._counter.usage(post)
