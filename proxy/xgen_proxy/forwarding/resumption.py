"""Resumes a stream that broke after the commit point, on another replica or backend, from its next character.

The fleet is planned anew, since it may have changed while the stream ran. The replica that just broke is left out, and
those that failed this request before come last. When a resumed stream gets further and breaks, it is planned anew,
too. A replica is asked to go on with the answer; if it cannot start in the middle, to give it again, and what the
client has is not sent twice. Where no replica can do either, one SSE error event ends the stream, without `[DONE]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import (
    BadGatewayError,
    DifferentAnswerError,
    ProxyError,
    RequestRejectedError,
    UnsupportedByBackendError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamServerError,
)
from xgen_proxy.forwarding.continuation import requests
from xgen_proxy.forwarding.continuation.resumed import ResumedStream
from xgen_proxy.forwarding.continuation.sent import (
    SentPrefix,
    is_complete,
    parse_sent_prefix,
    tokens_left,
    tokens_sent,
)
from xgen_proxy.forwarding.delivery import Delivery, backend_request, has_output
from xgen_proxy.forwarding.failover import Failover
from xgen_proxy.forwarding.outcome import Block
from xgen_proxy.forwarding.progress import Progress
from xgen_proxy.request.call import Call
from xgen_proxy.request.prompt import estimate_tokens
from xgen_proxy.routing.router import Router, Target

PLANS = 5  # for one stream
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
        broken = self.progress.failures[-1].target.replica.name
        try:
            prefix = await self._sent_prefix()
            self.progress.broken_in = self._block(prefix)
            if is_complete(prefix, self.call.features):
                await self.writer.end(sse.DONE)
            else:
                await self._by_plans(prefix)
        except (UpstreamError, ProxyError) as last:
            if self.delivery.finished:  # only the usage is missing
                why = error if prefix is None else last
                await self.writer.end(sse.comment(f"no usage: {why}") + sse.DONE)
                return
            self.progress.interrupted = error
            await self.writer.end(_error_event(broken, error, last))

    async def _by_plans(self, prefix: SentPrefix) -> None:
        """Plans again when the plan's targets have all failed, if one of them had gone on with the answer: a replica
        that broke or was restarted earlier may be up by now. Raises UpstreamError, ProxyError."""
        for more in reversed(range(PLANS)):
            before = self.progress.resumed
            try:
                await self.failover.resume(self._targets(prefix), self._resume_on)
            except UpstreamError as error:
                if not more or error.blame == "request" or self.progress.resumed == before:
                    raise
                prefix = await self._sent_prefix()
            else:
                return

    async def _sent_prefix(self) -> SentPrefix:
        """What the client has of the answer so far. Raises UpstreamProtocolError if it cannot be resumed.

        A long answer is parsed in a thread: the longest that is kept, of 16 MiB, takes half a second.
        """
        replay = self.delivery.replay
        if replay is None:
            reason = requests.why_not_resumable(self.call.features, self.call.body)
            raise UpstreamProtocolError(reason or "it has not begun")
        if replay.overflowed:
            raise UpstreamProtocolError("the answer is too long to be kept")
        if replay.size <= LONG:
            return parse_sent_prefix(replay.all())
        return await asyncio.to_thread(lambda: parse_sent_prefix(replay.all()))

    def _block(self, prefix: SentPrefix) -> Block:
        """The kind of block in which the stream broke."""
        needs = self.call.features.needs
        if prefix.in_reasoning:
            return "reasoning"
        if not needs.isdisjoint(requests.CONSTRAINED):
            return "constrained"
        return "tool_call" if self.delivery.hold is not None and self.delivery.hold.holding else "text"

    def _targets(self, prefix: SentPrefix) -> Sequence[Target]:
        """Targets that can resume the stream, by a new plan: not the one that just broke, and those that failed this
        request before last. Raises ProxyError if nothing can be planned."""
        features, broken = self.call.features, self.progress.failures[-1].target
        sent = estimate_tokens(prefix.reasoning + prefix.text)
        longer = replace(features, prompt_tokens=features.prompt_tokens + sent)
        if not features.fallback:
            longer = replace(longer, backend=broken.backend.name)
        failed = {failure.target.replica for failure in self.progress.failures}
        able = [
            target
            for target in self.router.targets(self.router.plan(longer, spare=1))
            if target.replica is not broken.replica
            and requests.can_take_over(target.backend.dialect, features, prefix, target.backend.template)
        ]
        return sorted(able, key=lambda target: target.replica in failed)

    async def _resume_on(self, target: Target, trace: bytes) -> None:
        """Bytes already sent stay sent: if this target fails too, the next one resumes after them."""
        prefix, features = await self._sent_prefix(), self.call.features
        request = backend_request(self.call, target)
        spent = await tokens_sent(target.backend.dialect, request, prefix, target.replica.post_json)
        left = tokens_left(features, spent)
        if prefix.finish is not None or (left is not None and left <= 0):
            await self._end_exhausted(target, trace, request, prefix, spent)
            return
        refused: UpstreamError = UnsupportedByBackendError("cannot start in the middle of such an answer")
        async for asked, stream in self._ways(target, request, prefix, spent):
            try:
                await self._relay(target, trace, asked, stream)
                return
            except (DifferentAnswerError, RequestRejectedError, UpstreamServerError) as error:
                if stream.began:
                    raise
                refused = error if isinstance(error, UpstreamError) else UnsupportedByBackendError(f"refuses: {error}")
        raise refused

    async def _ways(
        self, target: Target, request: BackendRequest, prefix: SentPrefix, spent: int
    ) -> AsyncIterator[tuple[BackendRequest, ResumedStream]]:
        """What the target may be asked, until it understands: to go on, or to give the answer again."""
        features, backend = self.call.features, target.backend
        continuing = requests.continuing_requests(backend.dialect, request, prefix, spent, backend.template)
        for asked in continuing:
            yield asked, ResumedStream(prefix, spent, features)
        if (
            continuing
            and prefix.text
            and backend.dialect.labels_by_prompt
            and features.needs.isdisjoint(requests.BLOCKS)
        ):
            text = replace(prefix, reasoning="")  # the template leaves the reasoning out of the prompt
            in_prompt = await tokens_sent(backend.dialect, request, text, target.replica.post_json)
            yield continuing[0], ResumedStream(prefix, spent, features, "relabel", in_prompt)
        if requests.may_repeat(features, prefix):
            yield request, ResumedStream(prefix, spent, features, "repeat")

    async def _end_exhausted(
        self, target: Target, trace: bytes, request: BackendRequest, prefix: SentPrefix, spent: int
    ) -> None:
        """Ends an answer that is complete, or as long as it may be. Only its finish_reason or usage is missing."""
        resumed = ResumedStream(prefix, spent, self.call.features, "usage")
        if prefix.finish is None:
            await self.writer.send(resumed.event({}, "length"))
            self.delivery.finished = True
        if self.call.features.include_usage:
            await self._relay(target, trace, requests.usage_request(request), resumed)
        else:
            await self.writer.end(sse.DONE)

    async def _relay(self, target: Target, trace: bytes, asked: BackendRequest, resumed: ResumedStream) -> None:
        with self.delivery.exchange_with(target, asked, trace) as exchange:
            await exchange.open()
            block = await exchange.first_events(lambda events: has_output(events) and resumed.check(events))
            resumed.began = True
            self.progress.resumed += 1
            await self.writer.comment(f"resumed on {self.progress.provenance}")
            editor = resumed.after(exchange.dialect.stream_editor(exchange.request))
            await self.delivery.relay(exchange, block, editor, finished=int(resumed.usage_only))


def _error_event(broken: str, error: UpstreamError, last: Exception) -> bytes:
    """`broken`: the replica that failed with `error`. `last`: why nothing could resume."""
    message = f"{broken} failed in the middle of the answer: {error}"
    if last is not error:
        message += f"; the answer could not be resumed elsewhere: {last}"
    return BadGatewayError(message, code="stream_broken").event()
