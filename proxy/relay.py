"""A plan in, an answer out: attempts, the commit point, and the bytes between.

    plan ──▶ attempt ── slot ── connection ── first real output ══ commit ══▶ bytes … [DONE] ──▶ account
               ▲  │        │         │                │                          │
               │  └────────┴─────────┴────────────────┘                          └─ breaks: one SSE error event,
               │    refused, reset, 5xx, 429, silence: nothing was shown,           no [DONE]
               └─── so the next candidate gets the request

An attempt owns one slot and one connection, and gives both back on every way out. Nothing of an attempt outlives it but
its failure. vLLM sends 200 and headers before it has accepted anything and reports overload as an event in the stream,
so the commit point is the first event that is not an error, not the status line.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.types import Send
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from proxy import sse
from proxy.aggregate import Aggregate
from proxy.answers import as_events, repair_whole
from proxy.bodies import prepare
from proxy.dialects import Json, Post, Request
from proxy.editors import Editor, editor_for
from proxy.errors import (
    BadRequest,
    Broken,
    Busy,
    ConnectFailed,
    GatewayFailed,
    ProxyError,
    TimedOut,
    Unable,
    Unavailable,
    UpstreamFailed,
)  # fmt: skip
from proxy.gateway import Call, Gateway
from proxy.policy import Candidate, Plan
from proxy.rewrites import asks_for_stream
from proxy.upstream import Connection
from proxy.verdicts import explain_empty, read_error, stream_error

PATHS = {"chat": b"/v1/chat/completions", "completions": b"/v1/completions", "embeddings": b"/v1/embeddings"}
EVENT_STREAM = b"text/event-stream; charset=utf-8"
STREAM_HEADERS = [(b"x-accel-buffering", b"no"), (b"cache-control", b"no-cache")]
JSON = b"application/json"
ERROR_BODY_LIMIT = 1024 * 1024


class Relay:
    """One request on its way. After run(): `status`, `candidate`, `failures`, `attempts`, `first_output` and `broken`
    tell what happened."""

    __slots__ = (
        "attempts", "broken", "call", "candidate", "failures", "first_output", "gateway", "plan", "remaining", "send",
        "status", "waited",
    )  # fmt: skip

    def __init__(self, gateway: Gateway, call: Call, plan: Plan, send: Send) -> None:
        self.gateway = gateway
        self.call = call
        self.plan = plan
        self.send = send
        self.remaining = list(plan.candidates)
        self.candidate: Candidate | None = None
        self.failures: list[tuple[Candidate, UpstreamFailed]] = []
        self.attempts = 0
        self.status = 0  # 0: nothing sent yet; not 0: committed
        self.waited = 0.0  # seconds spent waiting for slots and backends
        self.first_output = 0.0  # time.perf_counter()
        self.broken: UpstreamFailed | None = None  # after the commit

    async def run(self) -> None:
        """Raises ProxyError where nothing has been sent: the plan's error, Refused, or that every attempt failed."""
        if self.plan.error is not None:
            raise self.plan.error
        try:
            await self._attempt()  # the first by hand: a happy request pays nothing for the machinery of retrying
        except UpstreamFailed:
            await self._fall_back()

    async def _fall_back(self) -> None:
        def nothing_left(_: RetryCallState) -> bool:
            return not self.remaining

        if not self.remaining:
            raise self._all_failed()
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(UpstreamFailed), stop=nothing_left, reraise=True
            ):
                with attempt:
                    await self._attempt()
        except UpstreamFailed:
            raise self._all_failed() from None

    async def _attempt(self) -> None:
        candidate = await self._take_slot()
        replica = candidate.replica
        self.candidate = candidate
        self.remaining.remove(candidate)
        self.attempts += 1
        began = time.perf_counter()
        try:
            await self._try(candidate)
        except UpstreamFailed as error:
            self.waited += time.perf_counter() - began
            self._note(candidate, error)
            raise
        else:
            if self.broken is None:
                replica.succeeded()
            else:
                self._note(candidate, self.broken)
        finally:
            self.gateway.admission.release(replica)

    def _note(self, candidate: Candidate, error: UpstreamFailed) -> None:
        self.failures.append((candidate, error))
        if isinstance(error, ConnectFailed):
            self.gateway.monitor.down(candidate.replica, str(error))
        elif not isinstance(error, Busy | Unable):
            candidate.replica.failed(error.why)
            self.gateway.admission.gone()  # it may be suspect now
        self.gateway.telemetry.attempt_failed(self.call.id, candidate, error)

    async def _take_slot(self) -> Candidate:
        """On the first free candidate of the plan's next tier. A tier that is all down is passed over."""
        tier = self.remaining[0].tier
        began = time.perf_counter()
        try:
            return await self.gateway.admission.acquire(
                [candidate for candidate in self.remaining if candidate.tier == tier], self.call.features.urgency
            )
        except ConnectFailed as error:
            for candidate in self.remaining:
                if candidate.tier == tier:
                    self.failures.append((candidate, error))
            self.remaining = [candidate for candidate in self.remaining if candidate.tier != tier]
            raise
        finally:
            self.waited += time.perf_counter() - began

    def _all_failed(self) -> ProxyError:
        """502, or 504 when time ran out, or 503 when all were busy or down; with what was tried, in words."""
        errors = [error for _, error in self.failures]
        tried = "; ".join(f"{candidate.replica.name}: {error}" for candidate, error in self.failures)
        message = f"every backend that could answer was tried and failed ({tried})"
        if all(isinstance(error, Busy | ConnectFailed | Unable) for error in errors):
            return Unavailable(message, code="all_backends_failed", retry_after=2)
        return GatewayFailed(message, status=504 if isinstance(errors[-1], TimedOut) else 502)

    async def _try(self, candidate: Candidate) -> None:
        backend = candidate.backend
        call = self.call
        request = Request(call.features, call.body, call.raw, call.alias, backend.served(call.alias), backend.context)
        payload = self._prepare(candidate, request)
        streams = asks_for_stream(backend.dialect, request)
        limit = self._first_byte_limit(candidate) if streams else backend.settings.total_timeout_s
        began = time.perf_counter()
        deadline = began + limit
        pool = candidate.replica.pool
        total = backend.settings.total_timeout_s
        connection = await pool.exchange(self._head(candidate, len(payload)) + payload, limit, total)
        ending = reuse = False
        try:
            if connection.status != 200:
                body = await connection.read_all(max(0.01, deadline - time.perf_counter()), ERROR_BODY_LIMIT)
                raise read_error(connection.status, body)
            if not streams:
                await self._pass_whole(connection, candidate, request, began)
            elif call.features.stream:
                ending = await self._stream(connection, candidate, request, began, deadline)
            else:
                ending = await self._collect(connection, candidate, request, began, deadline)
            reuse = not streams or backend.dialect.reuse_after_stream
        finally:
            pool.release(connection, ending=ending, reuse=reuse)

    def _prepare(self, candidate: Candidate, request: Request) -> bytes:
        try:
            return prepare(candidate.backend.dialect, request)
        except BadRequest as error:
            if not self.failures:
                raise
            raise Unable(f"cannot take over: {error.message}") from None

    def _head(self, candidate: Candidate, length: int) -> bytes:
        call = self.call
        own = b"traceparent: " + call.trace + b"\r\n" if call.trace else b""
        if candidate.backend.dialect.request_id:
            own += b"x-request-id: " + call.id.encode() + b"\r\n"
        start = PATHS[call.features.endpoint], candidate.replica.head, own, length
        return b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % start

    def _first_byte_limit(self, candidate: Candidate) -> float:
        """Seconds; longer for longer prompts, since a CPU prefills some 100 tokens a second."""
        settings = candidate.backend.settings
        thousands = self.call.features.prompt_words / 1000
        return settings.first_byte_timeout_s + settings.first_byte_per_1k_words_s * thousands

    # the three ways an answer comes

    async def _pass_whole(self, connection: Connection, candidate: Candidate, request: Request, began: float) -> None:
        """A whole JSON answer, unparsed. Nothing of it is shown before all of it is here, so it can still fail over."""
        data = await connection.read_all(candidate.backend.settings.total_timeout_s)
        if sse.is_abort(data):
            raise Broken("finish_reason abort: the engine is shutting down")
        waited = time.perf_counter() - began
        data = repair_whole(candidate.backend.dialect, request, data)
        events = as_events(request, data) if request.features.stream else b""
        self.waited += waited  # an attempt that fails counts all of its time
        if request.features.stream:
            await self._start(candidate, EVENT_STREAM, STREAM_HEADERS)
            await self._send_body(events + sse.DONE, more=False)
        else:
            await self._send_whole(candidate, data)

    async def _collect(
        self, connection: Connection, candidate: Candidate, request: Request, began: float, deadline: float
    ) -> bool:
        """A stream put together to the whole answer: llama.cpp cancels only streams."""
        dialect = candidate.backend.dialect
        aggregate = Aggregate(dialect, request)
        splitter = sse.EventSplitter()
        block, done = sse.split_done(await self._first_events(connection, splitter, candidate, request, deadline))
        while block or not done:
            if sse.is_error(block):
                raise self._event_error(candidate, block)
            aggregate.feed(block)
            if aggregate.done:
                connection.close()
            if done or aggregate.done:
                break
            block, done = sse.split_done(await self._next_events(connection, splitter, candidate))
            if not block and not done:
                break
        await aggregate.finish(self._poster(candidate))
        self.waited += time.perf_counter() - began
        await self._send_whole(candidate, orjson.dumps(aggregate.result()))
        return done

    async def _stream(
        self, connection: Connection, candidate: Candidate, request: Request, began: float, deadline: float
    ) -> bool:
        """Returns whether the stream came to its `[DONE]`."""
        splitter = sse.EventSplitter()
        block = await self._first_events(connection, splitter, candidate, request, deadline)
        self.waited += time.perf_counter() - began
        await self._start(candidate, EVENT_STREAM, STREAM_HEADERS)
        try:
            return await self._relay(connection, splitter, candidate, request, block)
        except UpstreamFailed as error:
            self.broken = error
            await self._send_body(self._broken_event(candidate, error), more=False)
        except ProxyError as error:  # the backend's verdict on the request came late
            await self._send_body(error.event(), more=False)
        return False

    async def _relay(
        self, connection: Connection, splitter: sse.EventSplitter, candidate: Candidate, request: Request, block: bytes
    ) -> bool:
        editor = editor_for(candidate.backend.dialect, request)
        finished = 0
        done = False
        while block:
            if sse.is_error(block) or sse.is_abort(block):
                await self._send_good_events(block, editor)
                raise self._event_error(candidate, block)
            block, done = sse.split_done(block)
            if editor and block:
                block = editor.edit(block)
            if block:
                finished += sse.finishes(block)
                await self._send_body(block)
            if editor and editor.done:
                connection.close()
            if done or (editor and editor.done):
                break
            block = await self._next_events(connection, splitter, candidate)
        if finished < request.choices:
            raise Broken("the stream ended without a finish_reason")
        tail = await editor.finish(self._poster(candidate)) if editor else b""
        await self._send_body(tail + sse.DONE, more=False)
        return done

    async def _first_events(
        self,
        connection: Connection,
        splitter: sse.EventSplitter,
        candidate: Candidate,
        request: Request,
        deadline: float,
    ) -> bytes:
        """Waits for the first real output: the commit point. Raises what an error event or an empty stream means."""
        limit = self._first_byte_limit(candidate)
        while True:
            data = await connection.read(max(0.01, deadline - time.perf_counter()), limit)
            if not data:
                raise await explain_empty(candidate.backend.dialect, request, self._poster(candidate))
            block = splitter.feed(data)
            if sse.is_error(block):
                raise self._event_error(candidate, block)
            if sse.has_line(block, b"data: {"):
                return block

    async def _next_events(self, connection: Connection, splitter: sse.EventSplitter, candidate: Candidate) -> bytes:
        """b"" at the end of the stream."""
        timeout = candidate.backend.settings.idle_timeout_s
        while data := await connection.read(timeout):
            if block := splitter.feed(data):
                return block
        return b""

    def _event_error(self, candidate: Candidate, block: bytes) -> Exception:
        for event in sse.events(block):
            if sse.is_error(event):
                return stream_error(event)
        return Broken("finish_reason abort: the engine is shutting down")

    async def _send_good_events(self, block: bytes, editor: Editor | None) -> None:
        for event in sse.events(block):
            if sse.is_error(event) or sse.is_abort(event):
                return
            await self._send_body(editor.edit(event) if editor else event)

    def _poster(self, candidate: Candidate) -> Post:
        """Asks small questions of the same replica while its slot is ours."""
        pool = candidate.replica.pool
        limit = candidate.backend.settings.first_byte_timeout_s

        async def post(path: str, body: Json) -> tuple[int, Any]:
            payload = orjson.dumps(body)
            start = b"POST %b HTTP/1.1\r\n%b" % (path.encode(), candidate.replica.head)
            connection = await pool.exchange(b"%bcontent-length: %d\r\n\r\n%b" % (start, len(payload), payload), limit)
            try:
                return connection.status, orjson.loads(await connection.read_all(limit))
            except orjson.JSONDecodeError:
                raise Broken(f"{path} did not answer with JSON") from None
            finally:
                pool.release(connection)

        return post

    # to the client

    def _reason(self, candidate: Candidate) -> str:
        if not self.failures:
            return candidate.reason
        last, error = self.failures[-1]
        return f"fallback: {last.replica.name} {error.outcome}"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What every answer tells of itself."""
        headers = [(b"x-request-id", self.call.id.encode()), (b"x-attempts", b"%d" % self.attempts)]
        if self.candidate is not None:
            overhead_ms = (time.perf_counter() - self.call.started - self.waited) * 1000
            headers += [
                (b"x-backend", self.candidate.backend.name.encode()),
                (b"x-replica", self.candidate.replica.name.encode()),
                (b"x-route-reason", self._reason(self.candidate).encode("ascii", "replace")),
                (b"x-overhead-ms", b"%.2f" % max(overhead_ms, 0.0)),
            ]
        return headers

    async def _start(self, candidate: Candidate, kind: bytes, extra: list[tuple[bytes, bytes]]) -> None:
        self.first_output = time.perf_counter()
        self.status = 200
        headers = [(b"content-type", kind), *self.headers(), *extra]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_body(self, data: bytes, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def _send_whole(self, candidate: Candidate, data: bytes) -> None:
        await self._start(candidate, JSON, [(b"content-length", b"%d" % len(data))])
        await self._send_body(data, more=False)

    def _broken_event(self, candidate: Candidate, error: UpstreamFailed) -> bytes:
        message = f"{candidate.replica.name} failed in the middle of the answer: {error}"
        return GatewayFailed(message, code="stream_broken").event()
