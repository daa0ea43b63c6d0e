"""The connections to one backend server: reused where that is safe, opened where none is idle.

    Pool.exchange ── idle connection, else a new one ── request written ── status and headers read ──▶ Connection
    Pool.release ── response complete: kept for the next exchange; else closed, which cancels the request upstream

Backends close idle connections after 5 s (uvicorn, llama-server), so the pool closes its own earlier. If a reused
connection breaks before the first byte, the request is sent once more, on a new connection, since the server most
likely closed the old one before it read the request: https://github.com/vllm-project/vllm/pull/18472
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Sequence

from xgen_proxy.errors import UpstreamConnectError, UpstreamLocalError, UpstreamProtocolError
from xgen_proxy.own_limits import is_exhausted
from xgen_proxy.upstream.connection import Connection
from xgen_proxy.upstream.names import HostName

MAX_IDLE_S = 3.0  # backends close idle connections after 5 s
LAST_CHUNK_WAIT_S = 1.0  # for the empty last chunk of a stream whose `[DONE]` has arrived


class Pool:
    """The connections to one server.

    `opened` counts all that were ever opened, `resent` the requests that were sent a second time because a reused one
    died; `live` are open now, including `idle` ones, oldest first.
    `last_activity`: when data was last received and passed on, as loop time, which is that of time.monotonic().
    `awaiting_last_chunk`: connections that were released with only the last chunk missing, and their timers.
    """

    def __init__(self, host: str, port: int, *, connect_timeout_s: float = 2.0) -> None:
        self.host = host
        self.port = port
        self._name = HostName(host)
        self.connect_timeout_s = connect_timeout_s
        self.opened = self.resent = 0
        self.last_activity = 0.0
        self.live: set[Connection] = set()
        self.idle: deque[Connection] = deque()
        self.awaiting_last_chunk: dict[Connection, asyncio.TimerHandle] = {}

    async def exchange(self, request: bytes, timeout: float, total: float = math.inf) -> Connection:
        """Send `request` (head and body) and wait up to `timeout` seconds for status and headers.

        No read of the response waits longer than `total` seconds after the request was sent. The caller must release()
        the connection. Raises UpstreamConnectError, UpstreamLocalError, UpstreamTimeoutError, UpstreamProtocolError.
        """
        deadline = asyncio.get_running_loop().time() + timeout  # also for both, if the request is sent again
        reused = self._pop_idle()
        if reused is not None:
            try:
                return await self._send(reused, request, deadline, timeout, total)
            except UpstreamProtocolError:
                if reused.touched:
                    raise
            self.resent += 1
        return await self._send(await self._connect(), request, deadline, timeout, total)

    async def _send(
        self, connection: Connection, request: bytes, deadline: float, timeout: float, total: float
    ) -> Connection:
        try:
            connection.begin(request, total)
            await connection.read_headers(deadline, timeout)
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
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                connection = await self._connect_to_any(await self._name.addresses())
        except TimeoutError:
            raise UpstreamConnectError(f"no connection within {self.connect_timeout_s:g} s") from None
        except OSError as error:
            kind = UpstreamLocalError if is_exhausted(error) else UpstreamConnectError
            raise kind(error.strerror or str(error)) from None
        self.opened += 1
        if connection.open:  # not in connection_made(): uvloop calls no connection_lost() after a cancelled connect
            self.live.add(connection)
        return connection

    async def _connect_to_any(self, addresses: Sequence[str]) -> Connection:
        loop = asyncio.get_running_loop()
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return (await loop.create_connection(lambda: Connection(self, loop), address, self.port))[1]
        return (await loop.create_connection(lambda: Connection(self, loop), addresses[-1], self.port))[1]
