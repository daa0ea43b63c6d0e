"""Delivers the response of one replica to the client, in one of three ways.

the client wants     the replica was asked for
a stream             a stream              events pass as they come, repaired where the engine needs it
a whole response     a stream              collected here, since llama.cpp cancels only streams
either               a whole response      unparsed; as events if the client wants a stream
"""

from __future__ import annotations

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.stream_editors import StreamEditor
from xgen_proxy.dialects.whole_response import as_events
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import (
    BadRequestError,
    ProxyError,
    StreamInterruptedError,
    UnsupportedByBackendError,
    UpstreamError,
    UpstreamProtocolError,
)
from xgen_proxy.forwarding.continuation.hold import Hold, hold_for
from xgen_proxy.forwarding.continuation.requests import BLOCKS, why_not_resumable
from xgen_proxy.forwarding.exchange import Exchange
from xgen_proxy.forwarding.progress import Progress
from xgen_proxy.forwarding.replay_buffer import ReplayBuffer
from xgen_proxy.request.call import Call
from xgen_proxy.routing.router import Target


class Delivery:
    """`replay`: what the client has been sent of a stream; None if the stream cannot be resumed. `hold`: what of it is
    held back, if anything may be. `finished`: each of its choices has its finish_reason. `hold_constrained` is the
    setting.
    """

    def __init__(self, call: Call, writer: ResponseWriter, progress: Progress, *, hold_constrained: bool) -> None:
        self.call = call
        self.writer = writer
        self.progress = progress
        self.replay: ReplayBuffer | None = None
        self.hold: Hold | None = None
        self.finished = False
        self._hold_constrained = hold_constrained

    async def deliver(self, target: Target, trace: bytes) -> None:
        """Raises UpstreamError before the commit point, and StreamInterruptedError after it."""
        with self.exchange_with(target, backend_request(self.call, target), trace) as exchange:
            if not exchange.streams:
                await self._pass_whole(exchange)
            elif self.call.features.stream:
                await self._stream(exchange)
            else:
                await self._collect(exchange)

    def exchange_with(self, target: Target, request: BackendRequest, trace: bytes) -> Exchange:
        """Raises BadRequestError; on a later attempt UnsupportedByBackendError, since an earlier target could have
        served the request."""
        try:
            return Exchange(target.replica, request, self.progress.backend_request_id, trace)
        except BadRequestError as error:
            if not self.progress.failures:
                raise
            raise UnsupportedByBackendError(f"cannot take over: {error.message}") from None

    async def _pass_whole(self, exchange: Exchange) -> None:
        """Sends nothing before all of the response is here, so that it can still fail over."""
        with self.progress.waiting:
            await exchange.open()
            data = await exchange.whole()
        data = exchange.dialect.repair_whole(exchange.request, data)
        if exchange.request.features.endpoint == "chat":
            data = sse.one_reasoning_name(data)
        self.progress.tail = data
        if not exchange.request.features.stream:
            await self.writer.whole(self.progress.response_headers(), data)
            return
        events = as_events(exchange.request, data) + sse.DONE
        await self._start()
        await self.writer.end(events)

    async def _collect(self, exchange: Exchange) -> None:
        collector = exchange.dialect.stream_collector(exchange.request)
        with self.progress.waiting:
            await exchange.open()
            block, done = sse.split_done(await exchange.first_events())
            while block or not done:
                if sse.is_error(block) or sse.is_abort(block):
                    raise exchange.error_in(block)
                collector.feed(block)
                if collector.done:
                    exchange.cancel()
                if done or collector.done:
                    break
                block, done = sse.split_done(await exchange.next_events())
                if not block and not done:
                    break
            await collector.finish(exchange.post)
        if done:
            exchange.expect_close()
        self.progress.tail = collector.encoded()
        await self.writer.whole(self.progress.response_headers(), self.progress.tail)

    async def _stream(self, exchange: Exchange) -> None:
        resumable = why_not_resumable(self.call.features, self.call.body) is None
        with self.progress.waiting:
            await exchange.open()
            # Unless any replica can resume the stream, commit as late as possible: hold back the role-only chunk.
            plain = resumable and self.call.features.needs.isdisjoint(BLOCKS)
            block = await exchange.first_events(bool if plain else has_output)
        if resumable:
            self.replay = self.writer.sent_log = ReplayBuffer()
        await self._start()
        try:
            await self.relay(exchange, block, exchange.dialect.stream_editor(exchange.request))
        except UpstreamError as error:
            raise StreamInterruptedError(error) from None
        except ProxyError as error:  # the backend rejects the request only now
            await self.writer.end(error.event())

    async def _start(self) -> None:
        """The commit point of a stream. If comments have sent the headers already, one names the replica now."""
        waited = self.writer.status != 0
        self.progress.commit()
        await self.writer.start(self.progress.response_headers())
        if waited and self.progress.target is not None:
            await self.writer.comment(f"from {self.progress.provenance}")

    async def relay(self, exchange: Exchange, block: bytes, editor: StreamEditor | None, finished: int = 0) -> None:
        """Relays a stream from its first events to its end. Raises UpstreamError.

        `finished`: number of choices that had their finish_reason before.
        """
        request = exchange.request
        unparsed = editor is None and request.choices == 1 and exchange.splitter.passes_unparsed
        pass_through = self.writer.pass_through(exchange.splitter) if unparsed else None
        hold = self.hold = self._new_hold()
        if hold is not None:
            pass_through = hold.guard(pass_through)
        done = False
        last = b""
        while block:
            if sse.is_error(block) or sse.is_abort(block):
                await self._send_before_error(block, editor)
                raise exchange.error_in(block)
            block, done = sse.split_done(block)
            block = edited(block, editor)
            if block:
                finished += sse.count_finished(block)
                self.finished = finished >= request.choices
                last = block
                if hold is not None:
                    block = await self._let_pass(block, hold)
                await self.writer.send(block)
            if editor and editor.done:
                exchange.cancel()
            if done or (editor and editor.done):
                break
            try:
                block = await exchange.next_events(pass_through)
            except UpstreamError:
                if finished < request.choices or request.features.include_usage:
                    raise
                break  # only `[DONE]` was missing
        if finished < request.choices:
            raise UpstreamProtocolError("the stream ended without a finish_reason")
        tail = await editor.finish(exchange.post) if editor else b""
        if done:
            exchange.expect_close()
        self.progress.tail = last + tail
        await self.writer.end(tail + sse.DONE)

    async def _send_before_error(self, block: bytes, editor: StreamEditor | None) -> None:
        """Sends the events that come before the error or the abort."""
        for event in sse.events(block):
            if sse.is_error(event) or sse.is_abort(event):
                return
            if event := edited(event, editor):
                await self.writer.send(event if self.hold is None else self.hold.feed(event))

    def _new_hold(self) -> Hold | None:
        """What holds the stream of one replica. A stream that cannot be resumed is not held."""
        if self.replay is None:
            return None
        return hold_for(self.call.features, constrained=self._hold_constrained)

    async def _let_pass(self, block: bytes, hold: Hold) -> bytes:
        """What the client may get now, b"" if nothing; then it is shown from time to time that the stream is alive."""
        passed = hold.feed(block)
        if not passed and hold.wants_comment():
            await self.writer.alive()
        return passed


def has_output(events: bytes) -> bool:
    """Whether there is more than the role."""
    return not sse.is_role_only(events)


def edited(block: bytes, editor: StreamEditor | None) -> bytes:
    """What the client gets of these events: b"" if nothing, which must not be sent, as an empty chunk ends a body.

    Raises UpstreamProtocolError.
    """
    block = sse.one_reasoning_name(block)
    return editor.edit(block) if editor and block else block


def backend_request(call: Call, target: Target) -> BackendRequest:
    backend = target.backend
    return BackendRequest(call.features, call.body, call.raw, call.asked, backend.served(call.model), backend.context)
