"""The HTTP/1.1 connection to one backend server, and the pool of them: the hot path.

Hand-written because the relay is what this project exists for. On httptools' response parser (uvicorn uses its request
parser) a relayed request costs 42 µs of CPU; on httpx it costs 71 times that (docs/measurements.md). Bytes are passed
on as they arrive; a body is never split or copied.

    Pool.exchange ── idle connection, else a new one ── request written ── status and headers read ──▶ Connection
    Connection.read ── body bytes as they arrive, b"" at the end
    Pool.release ── response complete: kept for the next exchange; else closed, which cancels the request upstream

Backends close idle connections after 5 s (uvicorn, llama-server), so the pool closes its own earlier. A reused
connection that breaks before the first byte is replaced once: https://github.com/vllm-project/vllm/pull/18472
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from xgen_proxy.errors import UpstreamConnectError, UpstreamError, UpstreamProtocolError, UpstreamTimeoutError

MAX_IDLE_S = 3.0  # backends close idle connections after 5 s
MAX_EXCHANGES = 90  # llama-server closes a connection after 100
HIGH_WATER = 256 * 1024  # bytes; reading from a backend pauses while this much waits for a slow client
TIMER_PRECISION_S = 0.001  # uvloop's timers count in milliseconds
LAST_CHUNK_WAIT_S = 1.0  # for the empty last chunk of a stream whose `[DONE]` has arrived


class Connection(asyncio.Protocol):
    """One connection, with one exchange at a time.

    `status` and `headers` (lower-case names) belong to the current exchange. `paused`: reading is paused because
    `buffered`, the bytes that have arrived and were not read, exceeded HIGH_WATER.
    """

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
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
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(UpstreamProtocolError, f"not HTTP: {error}")
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
        name = name.lower()
        self.headers[name] = value
        if name in (b"content-length", b"transfer-encoding"):
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
        self.buffered = 0
        if self._transport is None:
            self._fail(UpstreamProtocolError, "closed without an answer")
        else:
            self._transport.write(request)

    async def read_headers(self, timeout: float) -> None:
        """Wait for status and headers. Raises UpstreamTimeoutError, UpstreamProtocolError."""
        deadline = self._loop.time() + timeout  # for all of them: a server that drips bytes times out too
        while not self.status:
            await self._wait_for_data(deadline - self._loop.time(), timeout)

    async def read(
        self, timeout: float, limit: float | None = None, on_data: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """Return the body bytes that have arrived since the last call, b"" at the end.

        `limit`: the seconds that an error message names, if `timeout` is what is left of them. `on_data` is called with
        bytes as they arrive; if it returns True it has handled them and read() keeps waiting, else read() returns them.
        Raises UpstreamTimeoutError, UpstreamProtocolError.
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

        Raises UpstreamTimeoutError, UpstreamProtocolError.
        """
        parts: list[bytes] = []
        size = 0
        deadline = self._loop.time() + timeout
        while data := await self.read(deadline - self._loop.time(), timeout):
            size += len(data)
            if size > limit:
                raise UpstreamProtocolError(f"an answer of more than {limit} bytes")
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
        if now >= self._deadline:
            self._fail(UpstreamTimeoutError, f"the answer took more than {self._total:.3g} s")
            self._wake()
        elif now >= silent_at:
            self._fail(UpstreamTimeoutError, f"nothing more came within {self._limit:.3g} s")
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


class Pool:
    """The connections to one server.

    `opened` counts all that were ever opened; `live` are open now, including `idle` ones, oldest first.
    `last_activity`: when data was last received and passed on, as loop time, which is that of time.monotonic().
    `awaiting_last_chunk`: connections that were released with only the last chunk missing, and their timers.
    """

    def __init__(self, host: str, port: int, *, connect_timeout_s: float = 2.0) -> None:
        self.host = host
        self.port = port
        self.connect_timeout_s = connect_timeout_s
        self.opened = 0
        self.last_activity = 0.0
        self.live: set[Connection] = set()
        self.idle: deque[Connection] = deque()
        self.awaiting_last_chunk: dict[Connection, asyncio.TimerHandle] = {}

    async def exchange(self, request: bytes, timeout: float, total: float = math.inf) -> Connection:
        """Send `request` (head and body) and wait up to `timeout` seconds for status and headers.

        No read of the response waits longer than `total` seconds after the request was sent. The caller must release()
        the connection. Raises UpstreamConnectError, UpstreamTimeoutError, UpstreamProtocolError.
        """
        while True:
            connection = self._pop_idle() or await self._connect()
            try:
                connection.begin(request, total)
                await connection.read_headers(timeout)
            except UpstreamProtocolError:
                connection.close()
                if connection.exchanges > 1 and not connection.touched:
                    continue  # it broke while idle, so the request never reached the server
                raise
            except BaseException:
                connection.close()
                raise
            return connection

    def release(self, connection: Connection, *, expect_last_chunk: bool = False, reuse: bool = True) -> None:
        """Keep the connection for reuse if its response is complete; else close it.

        `expect_last_chunk`: the response is complete except for its empty last chunk, so wait for that instead.
        """
        if not reuse or connection.failed:
            connection.close()
        elif connection.complete:
            self._keep(connection)
        elif expect_last_chunk:
            timer = asyncio.get_running_loop().call_later(LAST_CHUNK_WAIT_S, connection.close)
            self.awaiting_last_chunk[connection] = timer
        else:
            connection.close()

    def completed(self, connection: Connection) -> None:
        """Called by the connection when its response is complete."""
        timer = self.awaiting_last_chunk.pop(connection, None)
        if timer is not None:
            timer.cancel()
            self._keep(connection)

    def forget(self, connection: Connection) -> None:
        """Called by the connection when it has been closed."""
        self.live.discard(connection)
        timer = self.awaiting_last_chunk.pop(connection, None)
        if timer is not None:
            timer.cancel()
        if connection in self.idle:
            self.idle.remove(connection)

    def close(self) -> None:
        for connection in list(self.live):
            connection.close()

    def _keep(self, connection: Connection) -> None:
        if connection.reusable:
            connection.idle_since = asyncio.get_running_loop().time()
            self.idle.append(connection)
        else:
            connection.close()

    def _pop_idle(self) -> Connection | None:
        """The most recently used connection, so that the others age and get closed."""
        oldest = asyncio.get_running_loop().time() - MAX_IDLE_S
        while self.idle and self.idle[0].idle_since < oldest:
            self.idle.popleft().close()
        return self.idle.pop() if self.idle else None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                _, connection = await loop.create_connection(lambda: Connection(self, loop), self.host, self.port)
        except TimeoutError:
            raise UpstreamConnectError(f"no connection within {self.connect_timeout_s:g} s") from None
        except OSError as error:
            raise UpstreamConnectError(error.strerror or str(error)) from None
        self.opened += 1
        if connection.open:  # not in connection_made(): uvloop calls no connection_lost() after a cancelled connect
            self.live.add(connection)
        return connection
