"""One exchange with one replica: what is sent, how long each step may take, and the events or the whole that come back.

Entered while a slot of the replica is held. On every way out the connection is given back, to the pool where it can
serve again, else closed, which cancels the request upstream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from xgen_proxy import sse
from xgen_proxy.dialects.dialect import BackendRequest, Json
from xgen_proxy.dialects.error_mapping import explain_empty, read_error, stream_error
from xgen_proxy.dialects.request_rewrites import asks_for_stream
from xgen_proxy.dialects.request_rules import prepare
from xgen_proxy.errors import UpstreamProtocolError

if TYPE_CHECKING:
    from xgen_proxy.fleet.backend import Replica
    from xgen_proxy.gateway import Call
    from xgen_proxy.routing.router import Target

PATHS = {"chat": b"/v1/chat/completions", "completions": b"/v1/completions", "embeddings": b"/v1/embeddings"}
ERROR_BODY_LIMIT = 1024 * 1024


class Exchange:
    """`request`: what is asked of this replica. `streams`: it was asked for a stream. `ending`: set it when the answer
    is whole and only the closing chunk is still to come. `began`: time.perf_counter()."""

    __slots__ = (
        "backend", "began", "call", "candidate", "connection", "deadline", "ending", "limit", "payload", "replica",
        "request", "splitter", "streams",
    )  # fmt: skip

    def __init__(self, call: Call, candidate: Target, request: BackendRequest) -> None:
        """Raises BadRequestError where the backend cannot take the request."""
        self.call = call
        self.candidate = candidate
        self.backend = candidate.backend
        self.replica = candidate.replica
        self.request = request
        self.payload = prepare(self.backend.dialect, request)
        self.streams = asks_for_stream(self.backend.dialect, request)
        self.limit = self._first_byte_limit() if self.streams else self.backend.settings.total_timeout_s
        self.splitter = sse.EventSplitter()
        self.ending = False

    def _first_byte_limit(self) -> float:
        """Seconds; longer for longer prompts, since a CPU prefills some 100 tokens a second."""
        settings = self.backend.settings
        return settings.first_byte_timeout_s + settings.first_byte_per_1k_words_s * (
            self.request.features.prompt_words / 1000
        )

    async def __aenter__(self) -> Exchange:
        """Status and headers have come. Raises UpstreamError, and RequestRejectedError where the backend refuses the request."""
        self.began = time.perf_counter()
        self.deadline = self.began + self.limit
        total = self.backend.settings.total_timeout_s
        self.connection = await self.replica.pool.exchange(self._head() + self.payload, self.limit, total)
        if self.connection.status != 200:
            try:
                raise read_error(self.connection.status, await self.connection.read_all(self._left, ERROR_BODY_LIMIT))
            finally:
                self._release()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        reuse = not self.streams or self.backend.dialect.reuse_after_stream
        self.replica.pool.release(self.connection, ending=self.ending, reuse=reuse)

    def _head(self) -> bytes:
        own = self.call.trace
        if self.backend.dialect.request_id:
            own += b"x-request-id: " + self.call.id.encode() + b"\r\n"
        start = PATHS[self.request.features.endpoint], self.replica.head, own, len(self.payload)
        return b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % start

    @property
    def _left(self) -> float:
        return max(0.01, self.deadline - time.perf_counter())

    async def whole(self) -> bytes:
        """All of an answer that is no stream. Raises UpstreamError."""
        data = await self.connection.read_all(self.backend.settings.total_timeout_s)
        self.replica.record_activity()
        if sse.is_abort(data):
            raise UpstreamProtocolError("finish_reason abort: the engine is shutting down")
        return data

    async def first_events(self, *, past_role: bool = False) -> bytes:
        """Waits for the first real output: the commit point. vLLM sends 200 and headers before it has accepted
        anything. `past_role`: a chunk that only names the role is no output either. Raises what an error event or an
        empty stream means."""
        held = b""
        while True:
            data = await self.connection.read(self._left, self.limit)
            if not data:
                raise await explain_empty(self.backend.dialect, self.request, self.post)
            block = self.splitter.feed(data)
            if sse.is_error(block) or sse.is_abort(block):
                raise self.verdict(block)
            held += block
            if sse.has_line(block, b"data: {") and not (past_role and sse.only_role(held)):
                self.replica.record_activity()
                return held

    async def next_events(self, take: Callable[[bytes], bool] | None = None) -> bytes:
        """b"" at the end of the stream; what `take` takes is passed over. Raises UpstreamError."""
        timeout = self.backend.settings.idle_timeout_s
        while data := await self.connection.read(timeout, take=take):
            if block := self.splitter.feed(data):
                self.replica.record_activity()
                return block
        return b""

    def verdict(self, block: bytes) -> Exception:
        """What the error event or the abort in these events means."""
        for event in sse.events(block):
            if sse.is_error(event):
                return stream_error(event)
        return UpstreamProtocolError("finish_reason abort: the engine is shutting down")

    def stop(self) -> None:
        """All that is wanted has come: ends the generation."""
        self.connection.close()

    async def post(self, path: str, body: Json) -> tuple[int, Any]:
        return await ask(self.replica, path, body)


async def ask(replica: Replica, path: str, body: Json) -> tuple[int, Any]:
    return await replica.post_json(path, body)
