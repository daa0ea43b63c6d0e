"""Resumes a stream that broke after the commit point, on another replica or backend, from its next character.

The fleet is planned anew, since it may have changed while the stream ran. Replicas that have failed this request are
left out. Where no replica can resume the stream, one SSE error event ends it, without `[DONE]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from xgen_proxy import sse
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import BadGatewayError, ProxyError, UpstreamError, UpstreamProtocolError
from xgen_proxy.forwarding import continuation
from xgen_proxy.forwarding.continuation import ResumedStream, SentPrefix
from xgen_proxy.forwarding.delivery import Delivery, backend_request
from xgen_proxy.forwarding.failover import Failover
from xgen_proxy.forwarding.progress import Progress
from xgen_proxy.request.call import Call
from xgen_proxy.request.prompt import estimate_tokens
from xgen_proxy.routing.router import Router, Target

LONG = 512 * 1024  # bytes of events; parsing them takes 15 ms


class Resumption:
    """Resumes one stream, as often as it breaks."""

    def __init__(
        self,
        call: Call,
        writer: ResponseWriter,
        progress: Progress,
        delivery: Delivery,
        failover: Failover,
        router: Router,
    ) -> None:
        self.call = call
        self.writer = writer
        self.progress = progress
        self.delivery = delivery
        self.failover = failover
        self.router = router

    async def resume(self, error: UpstreamError) -> None:
        """Ends the stream in any case: with the rest of the answer, or with an error event about `error`."""
        prefix = None
        try:
            prefix = await self._sent_prefix()
            targets = self._targets(prefix)
            if continuation.is_complete(prefix, self.call.features):
                await self.writer.end(sse.DONE)
            else:
                await self.failover.resume(targets, self._resume_on)
        except (UpstreamError, ProxyError) as last:
            if prefix is not None and (await self._sent_prefix()).finish is not None:
                # The answer is complete; only its usage is missing.
                await self.writer.end(sse.comment(f"no usage: {last}") + sse.DONE)
                return
            self.progress.interrupted = error
            await self.writer.end(self._error_event(error, last))

    async def _sent_prefix(self) -> SentPrefix:
        """What the client has of the answer so far. Raises UpstreamProtocolError if it cannot be resumed.

        A long answer is parsed in a thread: the longest that is kept, of 16 MiB, takes half a second.
        """
        replay = self.delivery.replay
        if replay is None:
            reason = continuation.why_not_resumable(self.call.features, self.call.body)
            raise UpstreamProtocolError(reason or "it has not begun")
        if replay.overflowed:
            raise UpstreamProtocolError("the answer is too long to be kept")
        if replay.size <= LONG:
            return continuation.parse_sent_prefix(replay.all())
        return await asyncio.to_thread(lambda: continuation.parse_sent_prefix(replay.all()))

    def _targets(self, prefix: SentPrefix) -> Sequence[Target]:
        """Targets that can resume the stream, by a new plan. Raises ProxyError if nothing can be planned."""
        features = self.call.features
        longer = replace(features, prompt_tokens=features.prompt_tokens + estimate_tokens(prefix.text))
        failed = {failure.target.replica for failure in self.progress.failures}
        return [
            target
            for target in self.router.targets(self.router.plan(longer))
            if target.replica not in failed and target.backend.dialect.can_resume(features, target.backend.template)
        ]

    async def _resume_on(self, target: Target, trace: bytes) -> None:
        """Bytes already sent stay sent: if this target fails too, the next one resumes after them."""
        prefix, features = await self._sent_prefix(), self.call.features
        dialect, template = target.backend.dialect, target.backend.template
        request = backend_request(self.call, target)
        spent = await continuation.tokens_sent(dialect, request, prefix, target.replica.post_json)
        left = continuation.tokens_left(features, spent)
        exhausted = prefix.finish is not None or (left is not None and left <= 0)
        resumed = ResumedStream(prefix, spent, features, usage_only=exhausted)
        if exhausted and prefix.finish is None:
            await self.writer.send(resumed.event("", "length"))
        if exhausted and not features.include_usage:
            await self.writer.end(sse.DONE)
            return
        request = continuation.resumed_request(dialect, request, prefix, left, template)
        with self.delivery.exchange_with(target, request, trace) as exchange:
            await exchange.open()
            block = await exchange.first_events()
            self.progress.resumed += 1
            await self.writer.comment(f"resumed on {self.progress.provenance}")
            editor = resumed.after(dialect.stream_editor(exchange.request))
            await self.delivery.relay(exchange, block, editor, finished=int(exhausted))

    def _error_event(self, error: UpstreamError, last: Exception) -> bytes:
        failures = self.progress.failures
        broken = failures[0].target.replica.name if failures else "the backend"
        message = f"{broken} failed in the middle of the answer: {error}"
        if last is not error:
            message += f"; the answer could not be resumed elsewhere: {last}"
        return BadGatewayError(message, code="stream_broken").event()
