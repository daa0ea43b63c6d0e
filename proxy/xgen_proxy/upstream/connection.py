"""The HTTP/1.1 connection to one backend server.

Hand-written because the relay is what this project exists for. On httptools' response parser (uvicorn uses its request
parser) a relayed request costs some 45 µs of CPU; on httpx it costs 70 times that (docs/measurements.md). Bytes are
passed on as they arrive; a body is never split or copied.

    Connection.begin ── request written    Connection.read_headers ── status and headers
    Connection.read ── body bytes as they arrive, b"" at the end
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from xgen_proxy.errors import (
    UpstreamError,
    UpstreamOversizedError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
    UpstreamTooLongError,
)

MAX_EXCHANGES = 90  # llama-server closes a connection after 100
MAX_BODILESS = 64 * 1024  # bytes in a row without any of a body: heads, trailers, chunk extensions
HIGH_WATER = 256 * 1024  # bytes; reading from a backend pauses while this much waits for a slow client
TIMER_PRECISION_S = 0.001  # uvloop's timers count in milliseconds


class Owner(Protocol):
    """What a connection reports to: its pool."""

    last_activity: float

    def completed(self, connection: Connection) -> None: ...

    def forget(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection, with one exchange at a time.

    `status` and `headers` (lower-case names) belong to the current exchange. `paused`: reading is paused because
    `buffered`, the bytes that have arrived and were not read, exceeded HIGH_WATER.
    """

    def __init__(self, pool: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        # Not an exception: its traceback would refer back to this connection (garbage_collection.py).
        self._failure: tuple[type[UpstreamError], str] | None = None
        self._on_data: Callable[[bytes], bool] | None = None
        self._last_data = -math.inf  # loop time when `_on_data` last accepted data
        self._silent_at = self._limit = 0.0  # loop time when a wait without data is over, and the seconds it may take
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._keep_alive = False
        self._bodiless = 0  # bytes since the last one of a body
        self._total = self._deadline = math.inf  # seconds that the exchange may take, and loop time when they are over
        self.buffered = 0
        self.paused = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.framed = False  # the body's end is marked by its length or by chunks, not by closing the connection
        self.touched = False  # a byte of the response has arrived
        self.complete = True
        self.exchanges = 0
        self.idle_since = 0.0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.complete:  # unsolicited data: close, or the next response could be misattributed
            self.close()
            return
        self.touched = True
        buffered = self.buffered
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(UpstreamProtocolError, f"not HTTP: {error}")
            self.close()
        self._bodiless = 0 if self.buffered != buffered else self._bodiless + len(data)
        if self._bodiless > MAX_BODILESS and not self.complete:
            self._fail(UpstreamProtocolError, f"more than {MAX_BODILESS} bytes of headers")
            self.close()
        if self._on_data is None or not self._chunks or not self._on_data(self._join_chunks()):
            self._wake()
        else:
            self._clear_chunks()
            self._last_data = self._pool.last_activity = self._loop.time()
            if self.complete:
                self._wake()

    def _join_chunks(self) -> bytes:
        chunks = self._chunks
        if len(chunks) > 1:
            chunks[:] = [b"".join(chunks)]
        return chunks[0]

    def _clear_chunks(self) -> None:
        self._chunks.clear()
        self.buffered = 0
        if self.paused and self._transport is not None:
            self.paused = False
            self._transport.resume_reading()

    def eof_received(self) -> None:
        return None  # closes the transport, which calls connection_lost

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.forget(self)
        if not self.complete:
            if self.status and not self.framed and error is None:
                self.complete = True  # a body without length ends with the connection
            else:
                self._fail(
                    UpstreamProtocolError,
                    "the connection broke in mid-answer" if self.touched else "closed without an answer",
                )
        self._transport = None
        self._stop_timer()
        del self._parser  # it refers to this connection: break the reference cycle (garbage_collection.py)
        self._wake()

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self.complete:
            raise UpstreamProtocolError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            return  # a trailer
        name = name.lower()
        self.headers[name] = value
        if name == b"content-length" or (name == b"transfer-encoding" and value.lower() == b"chunked"):
            self.framed = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx is followed by the real response
            self.status = status
            self._keep_alive = self._parser.should_keep_alive()  # no longer available once the message is complete

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self.buffered += len(body)
        if self.buffered > HIGH_WATER and not self.paused and self._transport is not None:
            self.paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self._pool.completed(self)

    # one exchange

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def open(self) -> bool:
        return self._transport is not None

    @property
    def reusable(self) -> bool:
        return (
            self.complete
            and not self.paused
            and self._failure is None
            and self._transport is not None
            and not self._transport.is_closing()
            and self.exchanges < MAX_EXCHANGES
            and self._keep_alive
        )

    def begin(self, request: bytes, total: float) -> None:
        """Send a request whose response may take `total` seconds in all."""
        self._total = total
        self._deadline = self._loop.time() + total
        self.status = 0
        self.headers = {}
        self.framed = self.touched = self.complete = False
        self.exchanges += 1
        self._chunks.clear()
        self.buffered = self._bodiless = 0
        if self._transport is None:
            self._fail(UpstreamProtocolError, "closed without an answer")
        else:
            self._transport.write(request)

    async def read_headers(self, deadline: float, limit: float) -> None:
        """Wait for status and headers until `deadline`, in loop time: a server that drips bytes times out too.

        `limit`: the seconds that an error message names. Raises UpstreamTimeoutError, UpstreamProtocolError.
        """
        while not self.status:
            await self._wait_for_data(deadline - self._loop.time(), limit)

    async def read(
        self, timeout: float, limit: float | None = None, on_data: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """Return the body bytes that have arrived since the last call, b"" at the end.

        `limit`: the seconds that an error message names, if `timeout` is what is left of them. `on_data` is called with
        bytes as they arrive; if it returns True it has handled them and read() keeps waiting, else read() returns them.
        Raises UpstreamTimeoutError; UpstreamTooLongError, if the total limit ends a wait that may be longer; and
        UpstreamProtocolError.
        """
        while not self._chunks:
            if self.complete:
                return b""
            self._on_data = on_data
            try:
                await self._wait_for_data(timeout, limit or timeout)
            finally:
                self._on_data = None
        data = self._join_chunks()
        self._clear_chunks()
        return data

    async def read_all(self, timeout: float, limit: int = 64 * 1024 * 1024) -> bytes:
        """Return the rest of the body, at most `limit` bytes, within `timeout` seconds.

        Raises UpstreamOversizedError, UpstreamTimeoutError, UpstreamProtocolError.
        """
        parts: list[bytes] = []
        size = 0
        deadline = self._loop.time() + timeout
        while data := await self.read(deadline - self._loop.time(), timeout):
            size += len(data)
            if size > limit:
                raise UpstreamOversizedError(f"an answer of more than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _wait_for_data(self, timeout: float, limit: float) -> None:
        if self._failure is not None:
            kind, reason = self._failure
            raise kind(reason)
        waiter = self._waiter = self._loop.create_future()
        self._last_data = -math.inf
        self._silent_at = self._loop.time() + timeout
        self._limit = limit
        self._start_timer(min(self._silent_at, self._deadline))
        try:
            await waiter
        finally:
            self._waiter = None

    def _start_timer(self, at: float) -> None:
        """Keep a timer that runs until `at` or less. It outlives the wait: a timer costs 3 µs, a hundredth of a small
        request, and most waits end long before."""
        if at < self._timer_at:
            self._stop_timer()
            self._timer_at = at
            self._timer = self._loop.call_at(at, self._on_timer)

    def _stop_timer(self) -> None:
        self._timer_at = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._stop_timer()
        if self._waiter is None or self._waiter.done():
            return
        now = self._loop.time() + TIMER_PRECISION_S
        silent_at = max(self._silent_at, self._last_data + self._limit)
        if now >= silent_at:
            self._fail(UpstreamTimeoutError, f"nothing more came within {self._limit:.3g} s")
            self._wake()
        elif now >= self._deadline:
            self._fail(UpstreamTooLongError, f"the answer took more than {self._total:.3g} s")
            self._wake()
        else:
            self._start_timer(min(silent_at, self._deadline))

    def _fail(self, kind: type[UpstreamError], reason: str) -> None:
        if self._failure is None:
            self._failure = kind, reason

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
