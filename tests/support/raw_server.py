"""A server of raw bytes on a real socket, and a pool for it."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from xgen_proxy.upstream.pool import Pool

REQUEST = b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

Server = Callable[["Peer"], Coroutine[Any, Any, None]]


class Peer:
    """The server's end of one connection. `number` counts the connections, from 1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number

    async def request(self) -> bytes:
        return await self.reader.readexactly(len(REQUEST))

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    @property
    def blocked(self) -> bool:
        """send() waits, since the proxy does not read."""
        transport = self.writer.transport
        return transport.get_write_buffer_size() > transport.get_write_buffer_limits()[1]

    async def closed(self) -> None:
        """Returns when the proxy has closed the connection."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass


@asynccontextmanager
async def serving(script: Server) -> AsyncIterator[Pool]:
    """A pool for a server that runs `script` on each connection and then closes it. Checks that nothing stays open."""
    failures: list[BaseException] = []
    running: set[asyncio.Task[Any]] = set()
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        task = asyncio.current_task()
        assert task
        running.add(task)
        try:
            await script(Peer(reader, writer, count))
        except AssertionError as error:
            failures.append(error)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    pool = Pool("127.0.0.1", server.sockets[0].getsockname()[1])
    yield pool
    pool.close()
    await until(lambda: not pool.live)
    assert list(pool.idle) == []
    assert pool.awaiting_last_chunk == {}
    server.close()
    await until(lambda: not running)
    assert failures == []


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.001)


async def ask(pool: Pool, timeout: float = 10) -> tuple[int, bytes]:
    connection = await pool.exchange(REQUEST, timeout)
    try:
        return connection.status, await connection.read_all(timeout)
    finally:
        pool.release(connection)


def answers(*parts: bytes, then: Server | None = None) -> Server:
    """Respond to each request on each connection with `parts`; run `then` after the first response, and close."""

    async def script(peer: Peer) -> None:
        while True:
            assert await peer.request() == REQUEST
            await peer.send(*parts)
            if then:
                await then(peer)
                return

    return script


async def hang_up(peer: Peer) -> None:
    """Returning closes the connection."""


async def reset(peer: Peer) -> None:
    """RST, not FIN."""
    linger = struct.pack("ii", 1, 0)
    peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    peer.writer.transport.abort()


async def stay_silent(peer: Peer) -> None:
    await peer.closed()
