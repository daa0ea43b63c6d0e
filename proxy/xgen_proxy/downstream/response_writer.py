"""Sends a response to the client: through the direct writer if the server offers one, else through ASGI's send()."""

from __future__ import annotations

import asyncio
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
WAITING = sse.comment("waiting")


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
    `content_type`: the header of a whole response.
    """

    __slots__ = ("_body_size", "_direct", "_ended", "_send", "content_type", "first_output", "sent_log", "status")

    def __init__(self, send: Send, direct: DirectWriter | None) -> None:
        self._send = send
        self._direct = direct
        self._body_size: int | None = None
        self._ended = False
        self.content_type = JSON
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
        """Send a complete response, of the type `content_type`."""
        self._begin()
        self._body_size = len(data)
        headers = [self.content_type, *headers]
        if self._direct is not None and not self._direct.paused:
            self._direct.whole(headers, data)
            self._ended = True
        else:
            headers.append((b"content-length", b"%d" % len(data)))
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._finish(data)

    def waiting(self, headers: Headers) -> None:
        """Send a comment that says nothing; if it is the first output, it starts the stream. Never waits: without a
        direct writer, or while the client reads too slowly, it does nothing."""
        self._keep_alive(headers, lambda: WAITING)

    def _keep_alive(self, headers: Headers, events: Callable[[], bytes]) -> None:
        direct = self._direct
        if direct is None or direct.paused or direct.ended:
            return
        if not self.status:
            self.status = 200
            direct.start([*EVENT_STREAM, *headers])
        direct.chunk(events())

    async def start(self, headers: Headers) -> None:
        """Begin the stream, unless waiting() has; then `headers` come too late."""
        waited = self.status != 0
        self._begin()
        if waited:
            return
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
        await self._write(events)

    async def _write(self, events: bytes) -> None:
        if self._direct is not None and not self._direct.paused:
            self._direct.chunk(events)
        else:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def comment(self, text: str) -> None:
        """Send an SSE comment. It is not part of the response, so it is not recorded."""
        if not self._ended:
            await self._send({"type": "http.response.body", "body": sse.comment(text), "more_body": True})

    async def alive(self) -> None:
        """Show the client that the stream is alive, although there is no output yet."""
        await self.comment("waiting")

    async def fail(self, error: ProxyError, headers: Headers) -> None:
        """Send an error: as a response of its own, or as the last event if a stream has started."""
        if self.status:
            await self.end(error.event())
        else:
            await send_error(self._send, error, headers)
            self._ended = True

    async def end(self, data: bytes = b"") -> None:
        await self._finish(data)

    async def _finish(self, data: bytes) -> None:
        if not self._ended:
            await self._send({"type": "http.response.body", "body": data, "more_body": False})
            self._ended = True

    def pass_through(self, splitter: sse.EventSplitter) -> Callable[[bytes], bool] | None:
        """The callback that pass_through.py describes; None without a direct writer."""
        if self._direct is None:
            return None
        return pass_through(self._direct, splitter, None if self.sent_log is None else self.sent_log.add)


class KeepAlive:
    """`with KeepAlive(…):` sends a comment each `interval_s` in which the stream has sent nothing else, since some load
    balancers cut silent connections.

    The first comment starts the response, if nothing else has. This is also the log of a stream that needs no other.
    """

    def __init__(self, writer: ResponseWriter, interval_s: float, headers: Headers) -> None:
        self.count = 0
        self.size = 0
        self._writer = writer
        self._interval_s = interval_s
        self._headers = headers
        self._seen: int | None = 0

    def __enter__(self) -> None:
        self._writer.sent_log = self
        self._start_timer()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def add(self, block: bytes) -> None:
        self.count += 1
        self.size += len(block)

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._on_timer)

    def _on_timer(self) -> None:
        if self._writer.chunks == self._seen:
            self._writer.waiting(self._headers)
        self._seen = self._writer.chunks
        self._start_timer()


async def send_error(
    send: Send, error: ProxyError, headers: Headers, translated: tuple[int, bytes] | None = None
) -> None:
    """Send an error as a complete response, before anything else has been sent.

    `translated`: status and body in the words of another API than OpenAI's.
    """
    status, body = translated or (error.status, error.body())
    start: Message = {
        "type": "http.response.start",
        "status": status,
        "headers": [*error.headers(), (b"content-length", str(len(body)).encode()), *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
