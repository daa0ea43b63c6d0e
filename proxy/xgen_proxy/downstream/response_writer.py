"""What the client is sent: by the wire where there is one, else by ASGI's send()."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import Send

from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import DirectWriter, Headers
from xgen_proxy.downstream.request_body import send_error
from xgen_proxy.errors import ProxyError
from xgen_proxy.forwarding.replay_buffer import ReplayBuffer
from xgen_proxy.sse import EventSplitter

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
    (b"cache-control", b"no-cache"),
]
JSON = (b"content-type", b"application/json")


class ResponseWriter:
    """`status`: 0 until something has been sent. `first_output`: when that was, time.perf_counter(). `retained`: what
    was shown of a stream; None where a break cannot be mended anyway."""

    __slots__ = ("_send", "_size", "_wire", "first_output", "retained", "status")

    def __init__(self, send: Send, wire: DirectWriter | None) -> None:
        self._send = send
        self._wire = wire
        self.status = 0
        self.first_output = 0.0
        self.retained: ReplayBuffer | None = None
        self._size: int | None = None

    @property
    def bytes_sent(self) -> int | None:
        """Bytes of the answer, but for the closing `[DONE]`; None where nobody has counted them."""
        return self._size if self.retained is None else self.retained.size

    @property
    def chunks(self) -> int | None:
        return None if self.retained is None else self.retained.count

    def _begin(self) -> None:
        self.first_output = time.perf_counter()
        self.status = 200

    async def whole(self, headers: Headers, data: bytes) -> None:
        self._begin()
        self._size = len(data)
        headers = [JSON, *headers]
        if self._wire is not None and not self._wire.slow:
            self._wire.whole(headers, data)
        else:
            headers.append((b"content-length", b"%d" % len(data)))
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self.end(data)

    async def start(self, headers: Headers) -> None:
        """Of a stream."""
        self._begin()
        headers = [*EVENT_STREAM, *headers]
        if self._wire is not None:
            self._wire.start(headers)
        else:
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(self, events: bytes) -> None:
        if self.retained is not None:
            self.retained.add(events)
        if self._wire is not None and not self._wire.slow:
            self._wire.chunk(events)
        else:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def comment(self, text: str) -> None:
        """An SSE comment, which is no part of the answer."""
        await self._send({"type": "http.response.body", "body": sse.comment(text), "more_body": True})

    async def fail(self, error: ProxyError, headers: Headers) -> None:
        """As a response of its own, or as the last event of a stream that has begun."""
        if self.status:
            await self._send({"type": "http.response.body", "body": error.event()})
        else:
            await send_error(self._send, error, list(headers))

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def pass_through(self, splitter: EventSplitter) -> Callable[[bytes], bool] | None:
        """What hands ordinary events on as they come, without waking anybody: most of what a stream is made of. It says
        whether it has taken them."""
        if self._wire is None:
            return None
        wire, retained = self._wire, self.retained

        def take(data: bytes) -> bool:
            if splitter.rest or not sse.are_ordinary(data) or wire.slow:
                return False
            if retained is not None:
                retained.add(data)
            wire.chunk(data)
            return True

        return take
