"""A plan in, an answer out: attempts, the commit point, the bytes between, and what follows when they stop too soon.

    plan ──▶ attempt ── slot ── connection ── first real output ══ commit ══▶ bytes … [DONE] ──▶ account
               ▲  │        │         │                │                          │
               │  └────────┴─────────┴────────────────┘                          └─ breaks: a new plan, and the stream
               │    refused, reset, 5xx, 429, silence: nothing was shown,           goes on from its next character;
               └─── so the next candidate gets the request                          where it cannot: one SSE error
                                                                                    event, no [DONE]

An attempt owns one slot and one connection (forwarding/exchange.py), and gives both back on every way out. Nothing of an
attempt outlives it but its failure and what the client has been shown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import orjson
from starlette.types import Send
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from xgen_proxy import sse
from xgen_proxy.dialects.dialect import BackendRequest
from xgen_proxy.dialects.stream_collector import StreamCollector
from xgen_proxy.dialects.stream_editors import Editor, editor_for
from xgen_proxy.dialects.whole_response import as_events, repair_whole
from xgen_proxy.downstream.direct_writer import DirectWriter
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import (
    BadGatewayError,
    BadRequestError,
    ProxyError,
    UnsupportedByBackendError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamOverloadedError,
    UpstreamProtocolError,
    all_failed,
)  # fmt: skip
from xgen_proxy.forwarding import continuation
from xgen_proxy.forwarding.continuation import ResumedStream
from xgen_proxy.forwarding.exchange import Exchange, ask
from xgen_proxy.forwarding.replay_buffer import ReplayBuffer
from xgen_proxy.forwarding.retry_budget import TIMEOUT_FACTOR
from xgen_proxy.gateway import Call, Gateway
from xgen_proxy.request.features import Urgency, estimate_tokens
from xgen_proxy.routing.plan import Plan
from xgen_proxy.routing.router import Target

Work = Callable[[Target], Awaitable[None]]


class Relay:
    """One request on its way. After run() all but `remaining` tells what happened."""

    __slots__ = (
        "attempts", "broken", "call", "candidate", "continued", "ending", "failures", "gateway", "left_queue", "plan",
        "queued", "remaining", "reply", "waited",
    )  # fmt: skip

    def __init__(self, gateway: Gateway, call: Call, plan: Plan, send: Send, wire: DirectWriter | None = None) -> None:
        self.gateway = gateway
        self.call = call
        self.plan = plan
        self.reply = ResponseWriter(send, wire)
        self.remaining = gateway.router.targets(plan)
        self.candidate: Target | None = None
        self.failures: list[tuple[Target, UpstreamError]] = []
        self.attempts = 0
        self.waited = 0.0  # seconds spent waiting for slots and backends
        self.queued = 0.0  # of these, seconds in the queue for a slot
        self.left_queue = False  # the client left while the request was in it
        self.ending = b""  # the whole answer, or the last events of the stream
        self.broken: UpstreamError | None = None  # after the commit, and not mended
        self.continued = 0  # how often the stream went on elsewhere

    async def run(self) -> None:
        """Raises ProxyError where nothing has been sent: Refused, no slot, or that every attempt failed."""
        self.gateway.retries.in_flight += 1
        try:
            await self._run()
        finally:
            self.gateway.retries.in_flight -= 1
            for _, error in self.failures:  # its frames hold us, we hold it: memory would wait for the collector
                error.__traceback__ = None

    async def _run(self) -> None:
        try:
            await self._attempt(self._answer)  # by hand: a happy request pays nothing for the machinery of retrying
        except UpstreamError:
            await self._fall_back()
        if self.broken is not None:
            await self._mend(self.broken)

    async def _fall_back(self) -> None:
        began = time.perf_counter()
        async with self.gateway.retries:
            self.waited += time.perf_counter() - began
            try:
                await self._attempt_each(self._answer)
            except UpstreamError:
                raise all_failed((candidate.replica.name, error) for candidate, error in self.failures) from None

    async def _attempt_each(self, work: Work) -> None:
        """Until one candidate can. Raises UpstreamError, the last one's."""
        remaining = self.remaining

        def nothing_left(_: RetryCallState) -> bool:  # without `self`, which tenacity's circles would keep
            return not remaining

        if not remaining:
            raise self.failures[-1][1]
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(UpstreamError), stop=nothing_left, reraise=True
        ):
            with attempt:
                await self._attempt(work)

    async def _attempt(self, work: Work) -> None:
        candidate = await self._take_slot()
        replica = candidate.replica
        self.candidate = candidate
        self.remaining.remove(candidate)
        if self.attempts:
            self.gateway.telemetry.retries.add(candidate.backend.name)
        self.attempts += 1
        if self.call.span is not None:
            work = self.call.span.around(work, self)
        began = time.perf_counter()
        try:
            await work(candidate)
        except UpstreamError as error:
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

    def _note(self, candidate: Target, error: UpstreamError) -> None:
        self.failures.append((candidate, error))
        if isinstance(error, UpstreamConnectError):
            self.gateway.monitor.mark_down(candidate.replica, str(error))
        elif not isinstance(error, UpstreamOverloadedError | UnsupportedByBackendError):
            candidate.replica.failed(error.reason)
            self.gateway.admission.on_replica_down()  # its breaker may be open now
        self.gateway.telemetry.attempt_failed(self.call.id, candidate, error)

    async def _take_slot(self) -> Target:
        """On the first free candidate of the plan's next tier. A tier that is all down is passed over."""
        tier = self.remaining[0].tier
        candidates = [candidate for candidate in self.remaining if candidate.tier == tier]
        taken = self.gateway.admission.try_acquire(candidates)
        if taken is not None:
            return taken
        try:
            return await self._wait_for_slot(candidates)
        except UpstreamConnectError as error:
            self.failures += [(candidate, error) for candidate in candidates]
            self.remaining[:] = [candidate for candidate in self.remaining if candidate.tier != tier]
            raise

    async def _wait_for_slot(self, candidates: list[Target]) -> Target:
        begun = self.reply.status != 0  # who has seen half an answer waits longer for the rest
        admission = self.gateway.admission
        urgency: Urgency = "high" if begun else self.call.features.urgency
        began = time.perf_counter()
        try:
            return await admission.acquire(candidates, urgency, TIMEOUT_FACTOR if begun else 1)
        except asyncio.CancelledError:
            self.left_queue = True
            raise
        finally:
            waited = time.perf_counter() - began
            self.queued += waited
            self.waited += waited

    # an answer, in one of three ways

    async def _answer(self, candidate: Target) -> None:
        attempt = self._prepare(candidate, self._request(candidate))
        async with attempt:
            if not attempt.streams:
                await self._pass_whole(attempt)
            elif self.call.features.stream:
                await self._stream(attempt)
            else:
                await self._collect(attempt)

    def _request(self, candidate: Target) -> BackendRequest:
        call, backend = self.call, candidate.backend
        return BackendRequest(
            call.features, call.body, call.raw, call.alias, backend.served(call.alias), backend.context
        )

    def _prepare(self, candidate: Target, request: BackendRequest) -> Exchange:
        try:
            return Exchange(self.call, candidate, request)
        except BadRequestError as error:
            if not self.failures:
                raise
            raise UnsupportedByBackendError(f"cannot take over: {error.message}") from None

    async def _pass_whole(self, attempt: Exchange) -> None:
        """A whole JSON answer, unparsed. Nothing of it is shown before all of it is here, so it can still fail over."""
        data = await attempt.whole()
        waited = time.perf_counter() - attempt.began
        data = repair_whole(attempt.backend.dialect, attempt.request, data)
        self.ending = data
        if attempt.request.features.stream:
            data = as_events(attempt.request, data) + sse.DONE
        self.waited += waited  # an attempt that fails counts all of its time
        if attempt.request.features.stream:
            await self.reply.start(self.headers())
            await self.reply.end(data)
        else:
            await self.reply.whole(self.headers(), data)

    async def _collect(self, attempt: Exchange) -> None:
        """A stream put together to the whole answer: llama.cpp cancels only streams."""
        aggregate = StreamCollector(attempt.backend.dialect, attempt.request)
        block, done = sse.split_done(await attempt.first_events())
        while block or not done:
            if sse.is_error(block):
                raise attempt.verdict(block)
            aggregate.feed(block)
            if aggregate.done:
                attempt.stop()
            if done or aggregate.done:
                break
            block, done = sse.split_done(await attempt.next_events())
            if not block and not done:
                break
        await aggregate.finish(attempt.post)
        self.waited += time.perf_counter() - attempt.began
        attempt.ending = done
        self.ending = orjson.dumps(aggregate.result())
        await self.reply.whole(self.headers(), self.ending)

    async def _stream(self, attempt: Exchange) -> None:
        mendable = self.why_final is None
        block = await attempt.first_events(past_role=not mendable)  # who could not go on is shown as little as can be
        self.waited += time.perf_counter() - attempt.began
        if mendable:
            self.reply.retained = ReplayBuffer()
        await self.reply.start(self.headers())
        try:
            await self._relay(attempt, block, editor_for(attempt.backend.dialect, attempt.request))
        except UpstreamError as error:
            self.broken = error
        except ProxyError as error:  # the backend's verdict on the request came late
            await self.reply.end(error.event())

    async def _relay(self, attempt: Exchange, block: bytes, editor: Editor | None, finished: int = 0) -> None:
        """`finished`: how many choices had their finish_reason before."""
        request = attempt.request
        passing = self.reply.passing(attempt) if editor is None and request.choices == 1 else None
        done = False
        last = b""
        while block:
            if sse.is_error(block) or sse.is_abort(block):
                await self._show_good_events(block, editor)
                raise attempt.verdict(block)
            block, done = sse.split_done(block)
            if editor and block:
                block = editor.edit(block)
            if block:
                finished += sse.finishes(block)
                last = block
                await self.reply.show(block)
            if editor and editor.done:
                attempt.stop()
            if done or (editor and editor.done):
                break
            try:
                block = await attempt.next_events(passing)
            except UpstreamError:
                if finished < request.choices or request.features.include_usage:
                    raise
                break  # it had said everything but `[DONE]`
        if finished < request.choices:
            raise UpstreamProtocolError("the stream ended without a finish_reason")
        tail = await editor.finish(attempt.post) if editor else b""
        attempt.ending = done
        self.ending = last + tail
        await self.reply.end(tail + sse.DONE)

    async def _show_good_events(self, block: bytes, editor: Editor | None) -> None:
        for event in sse.events(block):
            if sse.is_error(event) or sse.is_abort(event):
                return
            await self.reply.show(editor.edit(event) if editor else event)

    # a stream that broke

    @property
    def why_final(self) -> str | None:
        """Why a break would be the end of the stream."""
        return continuation.why_not(self.call.features, self.call.body)

    async def _mend(self, error: UpstreamError) -> None:
        """The stream goes on elsewhere. Where it cannot, an error event ends it, unless only its usage is missing."""
        self.broken = None
        shown = None
        try:
            shown = self._shown()
            self.remaining = self._successors(shown)
            if not continuation.is_whole(shown, self.call.features):
                await self._attempt_each(self._go_on)
            else:
                await self.reply.end(sse.DONE)
        except (UpstreamError, ProxyError) as last:
            if shown is not None and self._shown().finish is not None:
                await self.reply.end(continuation.note(f"no usage: {last}") + sse.DONE)
                return
            self.broken = error
            await self.reply.end(self._broken_event(error, last))

    def _shown(self) -> continuation.SentPrefix:
        """Raises UpstreamProtocolError where it cannot be gone on with."""
        if self.reply.retained is None:
            raise UpstreamProtocolError(self.why_final or "it has not begun")
        if self.reply.retained.over:
            raise UpstreamProtocolError("the answer is too long to be kept")
        return continuation.parse_sent_prefix(self.reply.retained.all())

    def _successors(self, shown: continuation.SentPrefix) -> list[Target]:
        """Who may go on, by a plan made now: much may have changed since the stream began. Raises ProxyError."""
        features = self.call.features
        longer = replace(features, prompt_tokens=features.prompt_tokens + estimate_tokens(shown.text))
        plan = self.gateway.good_plan(longer)
        failed = {candidate.replica for candidate, _ in self.failures}
        return [
            candidate
            for candidate in self.gateway.router.targets(plan)
            if candidate.replica not in failed
            and continuation.can_continue(candidate.backend.dialect, features, candidate.backend.template)
        ]

    async def _go_on(self, candidate: Target) -> None:
        """Raises UpstreamError; what it has shown by then is shown, and the next goes on from there."""
        shown = self._shown()
        dialect, template = candidate.backend.dialect, candidate.backend.template
        request = self._request(candidate)
        spent = await continuation.tokens_of(dialect, request, shown, partial(ask, candidate.replica))
        left = continuation.tokens_left(request.features, spent)
        over = shown.finish is not None or (left is not None and left <= 0)
        seam = ResumedStream(shown, spent, request.features, quiet=over)
        if over and shown.finish is None:
            await self.reply.show(seam.event("", "length"))
        if over and not request.features.include_usage:
            await self.reply.end(sse.DONE)
            return
        async with self._prepare(candidate, continuation.request_for(dialect, request, shown, left, template)) as again:
            block = await again.first_events()
            self.continued += 1
            await self.reply.say(continuation.note(f"{candidate.replica.name} goes on; {self._reason(candidate)}"))
            await self._relay(again, block, seam.after(editor_for(dialect, again.request)), finished=int(over))

    # to the client

    def _reason(self, candidate: Target) -> str:
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

    def _broken_event(self, error: UpstreamError, last: Exception) -> bytes:
        broke = self.failures[0][0].replica.name if self.failures else "the backend"
        message = f"{broke} failed in the middle of the answer: {error}"
        if last is not error:
            message += f"; the answer could not go on elsewhere: {last}"
        return BadGatewayError(message, code="stream_broken").event()
