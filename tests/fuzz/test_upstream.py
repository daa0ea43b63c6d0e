"""Any bytes of a backend end in a response or an UpstreamError: no other exception, and no wait beyond the limits."""

from __future__ import annotations

import asyncio
import contextlib
import random

from tests.support.fuzzing import cut, examples, mutated, reported
from xgen_proxy.errors import UpstreamError
from xgen_proxy.upstream.pool import Pool

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
RESPONSES = [
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n3;x=y\r\nyou\r\n0\r\ntrailer: x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi",
    b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\naHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nb",
    b"",
]
TIMEOUT_S = 5.0  # for each example; the server closes, so that none should need a timeout


class Server:
    """Sends the pieces that it is given to each request, then closes."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.stays_open = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if self.stays_open:
                await reader.read(1)
        writer.close()


def response(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(200))
    return mutated(rng, rng.choice(RESPONSES))


async def exchanged(pool: Pool, *, reads_all: bool) -> None:
    """Raises UpstreamError."""
    connection = await pool.exchange(REQUEST, 0.2, 1)
    try:
        if reads_all:
            await connection.read_all(0.2, 10_000)
        else:
            while await connection.read(0.2):
                pass
        assert connection.complete
        assert 200 <= connection.status < 1000
    finally:
        pool.release(connection)


async def test_any_bytes_end_in_a_response_or_an_upstream_error() -> None:
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listening:
        pool = Pool(*listening.sockets[0].getsockname()[:2])
        for rng in examples():
            server.pieces = cut(rng, response(rng))
            server.stays_open = rng.random() < 0.01
            with reported(server.pieces):
                async with asyncio.timeout(TIMEOUT_S):
                    for _ in range(rng.choice((1, 1, 2))):
                        with contextlib.suppress(UpstreamError):
                            await exchanged(pool, reads_all=rng.random() < 0.5)
                    while len(pool.live) > len(pool.idle):  # noqa: ASYNC110  # closing takes a turn of the loop
                        await asyncio.sleep(0)
                assert raised == [], "an exception in a callback"
                assert len(pool.idle) <= 1
        pool.close()
