"""A connection against scripted servers on real sockets, on both event loops."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.support.raw_server import (
    CHUNKED,
    OK,
    REQUEST,
    Peer,
    Server,
    answers,
    ask,
    hang_up,
    reset,
    serving,
    stay_silent,
    until,
)
from xgen_proxy.errors import (
    UpstreamConnectError,
    UpstreamOversizedError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
    UpstreamTooLongError,
)
from xgen_proxy.upstream import connection as upstream
from xgen_proxy.upstream.connection import HIGH_WATER
from xgen_proxy.upstream.pool import Pool

# the ways in which a response is framed

GOOD: dict[str, tuple[Server, bytes]] = {
    "content-length": (answers(OK), b"ok"),
    "empty": (answers(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), b""),
    "chunked": (answers(CHUNKED, b"2\r\nok\r\n", b"3;x=y\r\nyes\r\n", b"0\r\n\r\n"), b"okyes"),
    "trailers": (answers(CHUNKED, b"2\r\nok\r\n0\r\nx-trailer: 1\r\n\r\n"), b"ok"),
    "until it closes": (answers(b"HTTP/1.1 200 OK\r\n\r\n", b"o", b"k", then=hang_up), b"ok"),
    "HTTP/1.0": (answers(b"HTTP/1.0 200 OK\r\n\r\nok", then=hang_up), b"ok"),
    "after 100 and 103": (answers(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 X\r\nlink: y\r\n\r\n" + OK), b"ok"),
    "byte by byte": (answers(*(bytes([byte]) for byte in CHUNKED + b"2\r\nok\r\n0\r\n\r\n")), b"ok"),
}


@pytest.mark.parametrize(("script", "body"), GOOD.values(), ids=GOOD.keys())
async def test_good_response(script: Server, body: bytes) -> None:
    async with serving(script) as pool:
        for _ in range(3):
            assert await ask(pool) == (200, body)


async def test_status_and_headers_are_available_before_the_body() -> None:
    proceed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\ncontent-length: 2\r\n\r\n")
        await proceed.wait()
        await peer.send(b"no")

    async with serving(script) as pool:
        connection = await pool.exchange(REQUEST, 10)
        assert (connection.status, connection.headers[b"retry-after"]) == (429, b"7")
        proceed.set()
        assert await connection.read_all(10) == b"no"
        pool.release(connection)


async def test_stream_is_read_as_it_arrives() -> None:
    proceed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"1\r\na\r\n")
        await proceed.wait()
        await peer.send(b"1\r\nb\r\n1\r\nc\r\n0\r\n\r\n")

    async with serving(script) as pool:
        connection = await pool.exchange(REQUEST, 10)
        assert await connection.read(10) == b"a"
        proceed.set()
        assert await connection.read(10) == b"bc"
        assert await connection.read(10) == b""
        pool.release(connection)


# the ways in which a response breaks

BROKEN: dict[str, Server] = {
    "closed without a byte": answers(then=hang_up),
    "reset without a byte": answers(then=reset),
    "closed in the status line": answers(b"HTTP/1.1 20", then=hang_up),
    "closed in the headers": answers(b"HTTP/1.1 200 OK\r\ncontent-", then=hang_up),
    "closed after 100": answers(b"HTTP/1.1 100 Continue\r\n\r\n", then=hang_up),
    "closed in the body": answers(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", then=hang_up),
    "reset in the body": answers(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", then=reset),
    "closed between chunks": answers(CHUNKED, b"2\r\nok\r\n", then=hang_up),
    "reset in a body without length": answers(b"HTTP/1.1 200 OK\r\n\r\nok", then=reset),
    "not HTTP": answers(b"SSH-2.0-OpenSSH_9.6\r\n", then=stay_silent),
    "a bad chunk size": answers(CHUNKED, b"zz\r\nok\r\n", then=stay_silent),
    "a bad content-length": answers(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nok", then=stay_silent),
    "both framings": answers(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", then=stay_silent
    ),
    "another protocol": answers(
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", then=stay_silent
    ),
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
async def test_broken_response(script: Server) -> None:
    async with serving(script) as pool:
        with pytest.raises(UpstreamProtocolError):
            await ask(pool)
        assert pool.opened == 1


async def test_connection_refused() -> None:
    async with serving(answers(OK)) as pool:
        port = pool.port
    with pytest.raises(UpstreamConnectError):
        await Pool("127.0.0.1", port).exchange(REQUEST, 10)


async def test_unknown_host_name() -> None:
    with pytest.raises(UpstreamConnectError):
        await Pool("no-such-host.invalid", 80).exchange(REQUEST, 10)


async def test_connect_timeout() -> None:
    """The kernel's queue is full and nothing accepts, so further connections are dropped, as by a dead host."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        queued = [socket.socket() for _ in range(3)]
        for each in queued:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        pool = Pool("127.0.0.1", listener.getsockname()[1], connect_timeout_s=0.05)
        with pytest.raises(UpstreamConnectError, match=r"no connection within 0\.05 s"):
            await pool.exchange(REQUEST, 10)
        assert not pool.live
        for each in queued:
            each.close()


SILENT: dict[str, Server] = {
    "no byte": answers(then=stay_silent),
    "half a head": answers(b"HTTP/1.1 200 OK\r\n", then=stay_silent),
    "no body": answers(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", then=stay_silent),
    "half a body": answers(CHUNKED, b"1\r\na\r\n", then=stay_silent),
}


@pytest.mark.parametrize("script", SILENT.values(), ids=SILENT.keys())
async def test_silence_times_out(script: Server) -> None:
    async with serving(script) as pool:
        with pytest.raises(UpstreamTimeoutError, match=r"within 0\.05 s"):
            await ask(pool, 0.05)


async def drip(peer: Peer) -> None:
    while not peer.writer.is_closing():
        await peer.send(b"x")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nx-long: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["head", "body"])
async def test_dripping_server_times_out(start: bytes) -> None:
    async with serving(answers(start, then=drip)) as pool:
        with pytest.raises(UpstreamTimeoutError):
            async with asyncio.timeout(5):
                await ask(pool, 0.2)


async def test_stream_may_last_longer_than_its_silence_limit() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(30):
            await asyncio.sleep(0.01)
            await peer.send(b"1\r\na\r\n")
        await peer.send(b"0\r\n\r\n")

    async with serving(script) as pool:
        connection = await pool.exchange(REQUEST, 10)
        text = b""
        while data := await connection.read(0.25):  # all of it takes longer
            text += data
        assert text == b"a" * 30
        pool.release(connection)


async def test_stream_may_not_last_longer_than_its_total_limit() -> None:
    async with serving(answers(b"HTTP/1.1 200 OK\r\n\r\n", then=drip)) as pool:
        connection = await pool.exchange(REQUEST, 10, total=0.2)
        read: list[bytes] = []

        async def read_on() -> None:
            while True:
                read.append(await connection.read(10))

        with pytest.raises(UpstreamTooLongError, match=r"the answer took more than 0\.2 s"):
            async with asyncio.timeout(5):
                await read_on()
        assert len(read) > 1
        pool.release(connection)


async def test_total_limit_applies_to_one_exchange() -> None:
    async with serving(answers(OK)) as pool:
        loop = asyncio.get_running_loop()
        connection = await pool.exchange(REQUEST, 10, total=0.1)
        over = loop.time() + 0.1
        await connection.read_all(10)
        pool.release(connection)
        await until(lambda: loop.time() > over)
        assert await ask(pool) == (200, b"ok")
        assert pool.opened == 1


# what surrounds a body has a limit


async def send_on(peer: Peer, data: bytes) -> None:
    """Up to 50 MB, unless the proxy closes."""
    for _ in range(50_000_000 // len(data)):
        await peer.send(data)


def floods(start: bytes, data: bytes) -> Server:
    async def flood(peer: Peer) -> None:
        await send_on(peer, data)

    return answers(start, then=flood)


FLOODS: dict[str, Server] = {
    "one header": floods(b"HTTP/1.1 200 OK\r\nx: ", b"x" * 10_000),
    "many headers": floods(b"HTTP/1.1 200 OK\r\n", b"".join(b"x-%d: y\r\n" % number for number in range(1000))),
    "interim answers": floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "a trailer": floods(CHUNKED + b"2\r\nok\r\n0\r\nx: ", b"x" * 10_000),
    "trailers": floods(CHUNKED + b"2\r\nok\r\n0\r\n", b"x: y\r\n" * 1000),
    "a chunk extension": floods(CHUNKED + b"2;x=", b"x" * 10_000),
}


@pytest.mark.parametrize("script", FLOODS.values(), ids=FLOODS.keys())
async def test_what_surrounds_a_body_has_a_limit(script: Server) -> None:
    async with serving(script) as pool:
        with pytest.raises(UpstreamProtocolError):
            await ask(pool)


async def test_many_small_chunks_are_no_flood_of_headers() -> None:
    chunk = b"1;x=yyyyyyyyyyyyyyyy\r\na\r\n"
    async with serving(answers(CHUNKED, *[chunk * 10_000] * 10, b"0\r\n\r\n")) as pool:
        assert await ask(pool) == (200, b"a" * 100_000)


async def test_a_trailer_is_no_header() -> None:
    async with serving(answers(CHUNKED, b"2\r\nok\r\n0\r\ncontent-type: text/html\r\n\r\n")) as pool:
        connection = await pool.exchange(REQUEST, 10)
        await connection.read_all(10)
        assert b"content-type" not in connection.headers
        pool.release(connection)


# a reader that is slower than its server


async def test_unread_data_pauses_the_server() -> None:
    sent = 0
    peers: list[Peer] = []

    async def script(peer: Peer) -> None:
        nonlocal sent
        peers.append(peer)
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while sent < 200_000_000:
            await peer.send(b"x" * 100_000)
            sent += 100_000

    async with serving(script) as pool:
        connection = await pool.exchange(REQUEST, 10)
        await until(lambda: connection.paused)
        await until(lambda: peers[0].blocked)  # the sockets' own buffers are full as well
        before = sent
        assert connection.buffered <= HIGH_WATER + 1_000_000
        assert sent < 50_000_000
        assert len(await connection.read(10)) >= HIGH_WATER
        while sent == before:  # it continues once data is read: the sockets' buffers first, then the server
            await connection.read(10)
        pool.release(connection)


async def test_large_response() -> None:
    size = 20 * HIGH_WATER
    script = answers(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size, b"x" * size)
    async with serving(script) as pool:
        for _ in range(2):
            status, body = await ask(pool)
            assert (status, len(body)) == (200, size)
        assert pool.opened == 1


async def test_response_over_the_limit() -> None:
    async with serving(answers(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000, then=stay_silent)) as pool:
        connection = await pool.exchange(REQUEST, 10)
        with pytest.raises(UpstreamOversizedError, match="more than 999 bytes"):
            await connection.read_all(10, 999)
        pool.release(connection)


async def test_unread_complete_response_does_not_block_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client disconnected after all of it had arrived, so much that reading was paused."""
    monkeypatch.setattr(upstream, "HIGH_WATER", 10)
    async with serving(answers(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 100)) as pool:
        for _ in range(2):
            connection = await pool.exchange(REQUEST, 10)
            assert connection.complete
            pool.release(connection)
