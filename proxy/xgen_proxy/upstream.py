"""The HTTP/1.1 connection to one backend server, and the pool of them: the measured hot path.

Own code because the relay is what this project exists for: on httptools' response parser (the parser that uvicorn
uses for requests) a relay costs a fiftieth of the CPU it costs on httpx (bench/overhead.py). It hands on whatever bytes
have arrived; it never splits or copies a body.

    Pool.exchange ── idle connection, else a new one ── request written ── status and headers read ──▶ Connection
    Connection.read ── body bytes as they come, b"" at the end
    Pool.release ── complete: kept for the next exchange; else closed, which cancels the request upstream

Backends close idle connections after 5 s (uvicorn, llama-server), so ours are kept for less, and a reused connection
that dies before the first byte is replaced once for free: https://github.com/vllm-project/vllm/pull/18472
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import cast

import httptools

from xgen_proxy.errors import UpstreamConnectError, UpstreamError, UpstreamProtocolError, UpstreamTimeoutError

IDLE_S = 3.0  # backends close theirs at 5 s
MAX_EXCHANGES = 90  # llama-server closes a connection after 100
HIGH_WATER = 256 * 1024  # stop reading from a backend when a slow client has this much to take
LINGER_S = 1.0  # for the last chunk of a stream whose `[DONE]` has come


class Connection(asyncio.Protocol):
    """One exchange at a time. `status` and `headers` (lower-case names) belong to the current one."""

    __slots__ = (
        "_chunks", "_expires", "_failure", "_heard", "_keep_alive", "_loop", "_parser", "_paused", "_pool", "_size",
        "_take", "_timer", "_total", "_transport", "_waiter", "complete", "exchanges", "framed", "headers",
        "idle_since", "status", "touched",
    )  # fmt: skip

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._failure: tuple[type[UpstreamError], str] | None = None  # no exception: its traceback would hold us
        self._paused = False
        self._take: Callable[[bytes], bool] | None = None
        self._heard = 0.0  # loop time of what it took last
        self._keep_alive = False
        self._total = self._expires = math.inf  # seconds the exchange may take, loop time when they are over
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.framed = False  # the body's end is marked by length or chunks, not by closing
        self.touched = False  # a byte of the answer has come
        self.complete = True
        self.exchanges = 0
        self.idle_since = 0.0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.complete:  # nobody asked: a server that talks out of turn is not to be trusted with the next request
            self.close()
            return
        self.touched = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(UpstreamProtocolError, f"not HTTP: {error}")
            self.close()
        if self._take is None or not self._chunks or not self._take(self._joined()):
            self._wake()
        else:
            self._emptied()
            self._heard = self._pool.last_activity = self._loop.time()
            if self.complete:
                self._wake()

    def _joined(self) -> bytes:
        chunks = self._chunks
        if len(chunks) > 1:
            chunks[:] = [b"".join(chunks)]
        return chunks[0]

    def _emptied(self) -> None:
        self._chunks.clear()
        self._size = 0
        if self._paused and self._transport is not None:
            self._paused = False
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
        del self._parser  # it holds our methods: a circle, which would wait for the garbage collector
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
        if status >= 200:  # 1xx is followed by the real answer
            self.status = status
            self._keep_alive = self._parser.should_keep_alive()  # it forgets when the message is complete

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._size += len(body)
        if self._size > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self._pool.completed(self)

    # one exchange

    @property
    def open(self) -> bool:
        return self._transport is not None

    @property
    def reusable(self) -> bool:
        return (
            self.complete
            and not self._paused
            and self._failure is None
            and self._transport is not None
            and not self._transport.is_closing()
            and self.exchanges < MAX_EXCHANGES
            and self._keep_alive
        )

    def begin(self, request: bytes, total: float) -> None:
        self._total = total
        self._expires = self._loop.time() + total
        self.status = 0
        self.headers = {}
        self.framed = self.touched = self.complete = False
        self.exchanges += 1
        self._chunks.clear()
        self._size = 0
        if self._transport is None:
            self._fail(UpstreamProtocolError, "closed without an answer")
        else:
            self._transport.write(request)

    async def answered(self, timeout: float) -> None:
        """Returns when status and headers are there. Raises UpstreamTimeoutError, UpstreamProtocolError."""
        deadline = self._loop.time() + timeout  # for all of it: one byte a minute is no answer
        while not self.status:
            await self._arrival(deadline - self._loop.time(), timeout)

    async def read(
        self, timeout: float, limit: float | None = None, take: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """All body bytes that have come since the last call; b"" at the end. Raises UpstreamTimeoutError, UpstreamProtocolError.

        `limit`: the seconds that the message names, where `timeout` is what is left of them. `take` is called with what
        comes meanwhile, as it comes, and says whether it takes it; what it does not take is returned.
        """
        while not self._chunks:
            if self.complete:
                return b""
            self._take = take
            try:
                await self._arrival(timeout, limit or timeout)
            finally:
                self._take = None
        data = self._joined()
        self._emptied()
        return data

    async def read_all(self, timeout: float, limit: int = 64 * 1024 * 1024) -> bytes:
        """The rest of the body, within `timeout` seconds. Raises UpstreamTimeoutError, UpstreamProtocolError."""
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

    async def _arrival(self, timeout: float, limit: float) -> None:
        if self._failure is not None:
            kind, why = self._failure
            raise kind(why)
        waiter = self._waiter = self._loop.create_future()
        self._heard = -math.inf
        self._watch(timeout, limit)
        try:
            await waiter
        finally:
            self._timer.cancel()
            self._waiter = None

    def _watch(self, timeout: float, limit: float) -> None:
        """Arms the timer for the end of the silence, or of the whole exchange where that comes first."""
        left = self._expires - self._loop.time()
        if left < timeout:
            self._timer = self._loop.call_later(left, self._expire, "the answer took more than", self._total)
        else:
            self._timer = self._loop.call_later(timeout, self._silent, limit)

    def _silent(self, limit: float) -> None:
        """What was taken since the waiting began puts it off: so a chunk costs no timer."""
        left = self._heard + limit - self._loop.time()
        if left > 0:
            self._watch(left, limit)
        else:
            self._expire("nothing more came within", limit)

    def _expire(self, what: str, seconds: float) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._fail(UpstreamTimeoutError, f"{what} {seconds:.3g} s")
            self._wake()

    def _fail(self, kind: type[UpstreamError], why: str) -> None:
        if self._failure is None:
            self._failure = kind, why

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Pool:
    """Connections to one server. `opened` counts them over its life; `live` are open now, idle ones included. `last_activity`:
    when part of an answer was last passed on, loop time, which is time.monotonic()'s."""

    def __init__(self, host: str, port: int, *, connect_timeout_s: float = 2.0) -> None:
        self.host = host
        self.port = port
        self.connect_timeout_s = connect_timeout_s
        self.opened = 0
        self.last_activity = 0.0
        self.live: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._ending: dict[Connection, asyncio.TimerHandle] = {}

    async def exchange(self, request: bytes, timeout: float, total: float = math.inf) -> Connection:
        """Sends `request` (head and body) and waits up to `timeout` seconds for status and headers. From then on no
        read of the answer waits longer than `total` seconds after the request was sent.

        Raises UpstreamConnectError, UpstreamTimeoutError, UpstreamProtocolError. Whoever gets the connection must release() it.
        """
        while True:
            connection = self._take_idle() or await self._connect()
            try:
                connection.begin(request, total)
                await connection.answered(timeout)
            except UpstreamProtocolError:
                connection.close()
                if connection.exchanges > 1 and not connection.touched:
                    continue  # it had died while idle; the request never reached the server
                raise
            except BaseException:
                connection.close()
                raise
            return connection

    def release(self, connection: Connection, *, ending: bool = False, reuse: bool = True) -> None:
        """`ending`: the answer is whole and only the closing chunk is still to come, so that waiting for it pays."""
        if not reuse or connection._failure is not None:
            connection.close()
        elif connection.complete:
            self._park(connection)
        elif ending:
            self._ending[connection] = asyncio.get_running_loop().call_later(LINGER_S, connection.close)
        else:
            connection.close()

    def completed(self, connection: Connection) -> None:
        timer = self._ending.pop(connection, None)
        if timer is not None:
            timer.cancel()
            self._park(connection)

    def forget(self, connection: Connection) -> None:
        self.live.discard(connection)
        timer = self._ending.pop(connection, None)
        if timer is not None:
            timer.cancel()
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        for connection in list(self.live):
            connection.close()

    def _park(self, connection: Connection) -> None:
        if connection.reusable:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.close()

    def _take_idle(self) -> Connection | None:
        """The youngest, so that the rest grow old and are closed."""
        oldest = asyncio.get_running_loop().time() - IDLE_S
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.popleft().close()
        return self._idle.pop() if self._idle else None

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
        if connection.open:  # not in connection_made: uvloop calls no connection_lost for one that nobody waited for
            self.live.add(connection)
        return connection
