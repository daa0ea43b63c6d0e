"""Sends a response to the client: through the direct writer if the server offers one, else through ASGI's send()."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from starlette.types import Message, Send

from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import DirectWriter, Headers
from xgen_proxy.downstream.pass_through import pass_through
from xgen_proxy.errors import ProxyError

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
    (b"cache-control", b"no-cache"),
]
JSON = (b"content-type", b"application/json")


class SentLog(Protocol):
    """Records the events that a stream sends. add() is called before each block is written."""

    def add(self, block: bytes) -> None: ...

    @property
    def size(self) -> int:
        """Bytes that were added."""

    @property
    def count(self) -> int:
        """Blocks that were added."""


class ResponseWriter:
    """Sends one response with status 200.

    `status` is 0 until something has been sent. `first_output`: when that was, as time.perf_counter(). Set `sent_log`
    before a stream starts to record and count its events. Once the response has ended, nothing is sent or recorded.
    """

    __slots__ = ("_body_size", "_direct", "_ended", "_send", "first_output", "sent_log", "status")

    def __init__(self, send: Send, direct: DirectWriter | None) -> None:
        self._send = send
        self._direct = direct
        self._body_size: int | None = None
        self._ended = False
        self.status = 0
        self.first_output = 0.0
        self.sent_log: SentLog | None = None

    @property
    def bytes_sent(self) -> int | None:
        """Bytes of the response without the closing `[DONE]`; None for a stream without a log."""
        return self._body_size if self.sent_log is None else self.sent_log.size

    @property
    def chunks(self) -> int | None:
        """Chunks of the stream; None without a log."""
        return None if self.sent_log is None else self.sent_log.count

    def _begin(self) -> None:
        self.first_output = time.perf_counter()
        self.status = 200

    async def whole(self, headers: Headers, data: bytes) -> None:
        """Send a complete JSON response."""
        self._begin()
        self._body_size = len(data)
        headers = [JSON, *headers]
        if self._direct is not None and not self._direct.paused:
            self._direct.whole(headers, data)
            self._ended = True
        else:
            headers.append((b"content-length", b"%d" % len(data)))
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self.end(data)

    async def start(self, headers: Headers) -> None:
        self._begin()
        headers = [*EVENT_STREAM, *headers]
        if self._direct is not None:
            self._direct.start(headers)
        else:
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(self, events: bytes) -> None:
        """Send events of the stream, and record them."""
        if not events or self._ended:
            return
        if self.sent_log is not None:
            self.sent_log.add(events)
        if self._direct is not None and not self._direct.paused:
            self._direct.chunk(events)
        else:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def comment(self, text: str) -> None:
        """Send an SSE comment. It is not part of the response, so it is not recorded."""
        if not self._ended:
            await self._send({"type": "http.response.body", "body": sse.comment(text), "more_body": True})

    async def fail(self, error: ProxyError, headers: Headers) -> None:
        """Send an error: as a response of its own, or as the last event if a stream has started."""
        if self.status:
            await self.end(error.event())
        else:
            await send_error(self._send, error, headers)
            self._ended = True

    async def end(self, data: bytes = b"") -> None:
        if not self._ended:
            await self._send({"type": "http.response.body", "body": data, "more_body": False})
            self._ended = True

    def pass_through(self, splitter: sse.EventSplitter) -> Callable[[bytes], bool] | None:
        """The callback that pass_through.py describes; None without a direct writer."""
        if self._direct is None:
            return None
        return pass_through(self._direct, splitter, None if self.sent_log is None else self.sent_log.add)


async def send_error(send: Send, error: ProxyError, headers: Headers) -> None:
    """Send an error as a complete response, before anything else has been sent."""
    body = error.body()
    start: Message = {
        "type": "http.response.start",
        "status": error.status,
        "headers": [*error.headers(), (b"content-length", str(len(body)).encode()), *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
