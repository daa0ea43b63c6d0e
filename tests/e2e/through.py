"""A request through a dialect to a real server and back, without the proxy around it: what the relay does, plainly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import httpx
import orjson

from tests.support.real_servers import MODEL
from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.error_mapping import read_error, stream_error
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.dialects.whole_response import as_events
from xgen_proxy.request.features import Endpoint, Json
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.parsing import parse_features

T = TypeVar("T")
PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings",
}  # fmt: skip


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


class Through:
    """`ask` gives what a client that wants it whole would get, `stream` the chunks that a client would get."""

    def __init__(self, dialect: str, url: str, alias: str = "public", context: int | None = None) -> None:
        self.dialect = DIALECTS[dialect]
        self.url = url
        self.alias = alias
        self.context = context
        self.posts: list[tuple[str, int]] = []  # (path, status) of what was asked after a stream

    def ask(self, endpoint: Endpoint, **body: Any) -> Any:
        return run(self._ask(self.request(endpoint, body)))

    def stream(self, endpoint: Endpoint, **body: Any) -> list[Json]:
        return run(self._stream(self.request(endpoint, {**body, "stream": True})))

    def own(self, endpoint: Endpoint, **body: Any) -> httpx.Response:
        """The server's own answer to the same, whole unless `stream` is among it."""
        request = self.request(endpoint, body)
        kept = {name: body[name] for name in ("stop", "stream") if name in body}
        sent = {**orjson.loads(self.dialect.prepare(request)), "stream": False, **kept}
        sent.pop("stream_options", None)
        return httpx.post(self.url + request.path, json=sent, timeout=120)

    def request(self, endpoint: Endpoint, body: Json) -> BackendRequest:
        body = {"model": self.alias, **body}
        features = parse_features(body, {}, endpoint, Limits())
        return BackendRequest(features, body, orjson.dumps(body), self.alias, MODEL, self.context)

    async def _ask(self, request: BackendRequest) -> Any:
        if not self.dialect.asks_for_stream(request):
            return orjson.loads(self.dialect.repair_whole(request, await self._whole(request)))
        aggregate = self.dialect.stream_collector(request)
        async for block in self._blocks(request):
            aggregate.feed(block)
            if aggregate.done:
                break
        await aggregate.finish(self.post)
        return aggregate.result()

    async def _stream(self, request: BackendRequest) -> list[Json]:
        if not self.dialect.asks_for_stream(request):
            data = self.dialect.repair_whole(request, await self._whole(request))
            return list(sse.parse_chunks(as_events(request, data)))
        editor = self.dialect.stream_editor(request)
        out = b""
        async for block in self._blocks(request):
            out += editor.edit(block) if editor else block
            if editor and editor.done:
                break
        out += await editor.finish(self.post) if editor else b""
        return list(sse.parse_chunks(out))

    async def _whole(self, request: BackendRequest) -> bytes:
        async with httpx.AsyncClient(timeout=120) as client:
            answer = await client.post(self.url + request.path, content=self.dialect.prepare(request), headers=JSON)
        if answer.status_code != 200:
            raise read_error(answer.status_code, answer.content)
        return answer.content

    async def _blocks(self, request: BackendRequest) -> AsyncIterator[bytes]:
        """Whole events up to `[DONE]`. Raises what an error of any shape means."""
        content = self.dialect.prepare(request)
        came = False
        async with (
            httpx.AsyncClient(timeout=120) as client,
            client.stream("POST", self.url + request.path, content=content, headers=JSON) as answer,
        ):
            if answer.status_code != 200:
                raise read_error(answer.status_code, await answer.aread())
            splitter = sse.EventSplitter()
            async for data in answer.aiter_raw():
                for event in sse.events(splitter.feed(data)):
                    if sse.is_error(event):
                        raise stream_error(event)
                    block, done = sse.split_done(event)
                    came = came or bool(block)
                    if block:
                        yield block
                    if done:
                        return
        if not came:
            raise await self.dialect.explain_empty_stream(request, self.post)

    async def post(self, path: str, body: Json) -> tuple[int, Any]:
        async with httpx.AsyncClient(timeout=120) as client:
            answer = await client.post(self.url + path, json=body)
        self.posts.append((path, answer.status_code))
        return answer.status_code, answer.json()


JSON = {"content-type": "application/json"}


def text_of(chunks: list[Json]) -> str:
    """What a client would join to the answer's text."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)


def user(content: Any) -> list[Json]:
    return [{"role": "user", "content": content}]
