"""Delivers an answer that the proxy does not read: whole with the content type it has, or event by event.

Whether it is a stream, only its content type tells: an engine may ignore the form's field `stream`.
"""

from __future__ import annotations

from dataclasses import replace

from xgen_proxy import sse
from xgen_proxy.dialects.error_mapping import stream_error
from xgen_proxy.dialects.stream_editors import rename_model
from xgen_proxy.errors import ProxyError, StreamInterruptedError, UpstreamError
from xgen_proxy.forwarding.delivery import Delivery, backend_request
from xgen_proxy.forwarding.exchange import Exchange
from xgen_proxy.routing.router import Target

LONGEST_TYPE = 200  # characters of a content type
EMPTY = b"\n"  # a complete answer, if a transcript has no words
ERRORS = (b'{"error":{', b'{"error": {', b'{"error":"', b'{"error": "')  # with status 200
UNKNOWN_TYPE = b"application/octet-stream"


class OpaqueDelivery(Delivery):
    """Failover works as for any request until the first output. A stream that breaks later ends with an error event."""

    async def deliver(self, target: Target, trace: bytes) -> None:
        request = replace(backend_request(self.call, target), form=self.call.form)
        with self.exchange_with(target, request, trace) as exchange:
            with self.progress.waiting:
                await exchange.open()
            content_type = exchange.connection.headers.get(b"content-type", UNKNOWN_TYPE)
            if content_type.lower().startswith(b"text/event-stream"):
                exchange.streams = True
                await self._pass_stream(exchange)
            else:
                await self._pass_body(exchange, content_type[:LONGEST_TYPE])

    async def _pass_body(self, exchange: Exchange, content_type: bytes) -> None:
        """Sends nothing before all of it is here, so that it can still fail over."""
        with self.progress.waiting:
            data = await exchange.body()
        if content_type.lower().startswith(b"application/json"):
            if data.lstrip().startswith(ERRORS):
                raise stream_error(b"data: " + data.replace(b"\n", b" "))
            data = exchange.dialect.repair_whole(exchange.request, data)
        self.progress.tail = data or EMPTY
        self.writer.content_type = b"content-type", content_type
        await self.writer.whole(self.progress.response_headers(), data)

    async def _pass_stream(self, exchange: Exchange) -> None:
        exchange.splitter = sse.EventSplitter()  # as they come, whatever their form
        with self.progress.waiting:
            block = await exchange.first_events()
        await self.writer.start(self.progress.response_headers())
        try:
            while block:
                for event in sse.events(block):
                    if sse.is_error(event) or sse.is_abort(event):
                        raise exchange.error_in(event)
                    self.progress.tail = rename_model(exchange.request, event)
                    await self.writer.send(self.progress.tail)
                block = await exchange.next_events()
        except UpstreamError as error:
            self.progress.tail = b""
            raise StreamInterruptedError(error) from None
        except ProxyError as error:
            await self.writer.end(error.event())
        else:
            await self.writer.end()
