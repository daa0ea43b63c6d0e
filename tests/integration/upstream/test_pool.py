"""The pool against scripted servers on real sockets, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket

import pytest

from tests.support.raw_server import (
    CHUNKED,
    OK,
    REQUEST,
    Peer,
    answers,
    ask,
    hang_up,
    serving,
    stay_silent,
    until,
)
from xgen_proxy.errors import UpstreamLocalError, UpstreamProtocolError, UpstreamTimeoutError
from xgen_proxy.upstream import connection as upstream_connection
from xgen_proxy.upstream import pool as upstream_pool
from xgen_proxy.upstream.connection import Connection
from xgen_proxy.upstream.pool import Pool

# the pool


async def test_most_recently_used_connection_is_reused_first() -> None:
    async with serving(answers(OK)) as pool:
        first, second = [await pool.exchange(REQUEST, 10) for _ in range(2)]
        for connection in (first, second):
            await connection.read_all(10)
            pool.release(connection)
        assert (pool.opened, len(pool.live)) == (2, 2)
        assert await pool.exchange(REQUEST, 10) is second
        await second.read_all(10)
        pool.release(second)
        assert pool.opened == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        OK + b"\x00\x01garbage",
    ],
    ids=["close", "HTTP/1.0", "a second response", "garbage after it"],
)
async def test_connection_that_must_not_be_reused(answer: bytes) -> None:
    async with serving(answers(answer)) as pool:
        for _ in range(3):
            assert await ask(pool) == (200, b"ok")
        assert pool.opened == 3


async def test_unsolicited_data_closes_the_connection() -> None:
    answered = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await answered.wait()
        if peer.number == 1:
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        await peer.closed()

    async with serving(script) as pool:
        assert await ask(pool) == (200, b"ok")
        answered.set()
        await until(lambda: not pool.live)
        assert await ask(pool) == (200, b"ok")


async def test_old_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(answers(OK)) as pool:
        await ask(pool)
        monkeypatch.setattr(upstream_pool, "MAX_IDLE_S", -1.0)
        await ask(pool)
        assert pool.opened == 2


async def test_connections_are_closed_before_llama_server_closes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_connection, "MAX_EXCHANGES", 2)
    async with serving(answers(OK)) as pool:
        for _ in range(4):
            await ask(pool)
        assert pool.opened == 2


async def test_connection_that_broke_while_idle_is_replaced() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if peer.number <= 2:
            await peer.reader.read(1)  # the next request begins: close without sending a byte
            peer.writer.transport.abort()
        else:
            await peer.closed()

    async with serving(script) as pool:
        first, second = [await pool.exchange(REQUEST, 10) for _ in range(2)]
        for connection in (first, second):
            await connection.read_all(10)
            pool.release(connection)
        assert await ask(pool) == (200, b"ok")
        assert pool.opened == 3


async def idle_connections(pool: Pool, count: int) -> None:
    connections = [await pool.exchange(REQUEST, 10) for _ in range(count)]
    for connection in connections:
        await connection.read_all(10)
        pool.release(connection)


@pytest.mark.parametrize("idle", [1, 12])
async def test_a_request_is_sent_twice_at_most(idle: int) -> None:
    """However many idle connections there are: a server that reads a request and closes may have executed it."""
    executed = 0

    async def script(peer: Peer) -> None:
        nonlocal executed
        if peer.number <= idle:
            await peer.request()
            await peer.send(OK)
        await peer.request()
        executed += 1

    async with serving(script) as pool:
        await idle_connections(pool, idle)
        with pytest.raises(UpstreamProtocolError, match="closed without an answer"):
            await ask(pool)
        assert (executed, pool.resent, pool.opened) == (2, 1, idle + 1)


async def test_a_resent_request_has_one_time_limit() -> None:
    async def script(peer: Peer) -> None:
        if peer.number == 1:
            await peer.request()
            await peer.send(OK)
            await peer.request()
            await asyncio.sleep(0.4)  # then it closes without a byte
        else:
            await peer.request()
            await peer.closed()

    async with serving(script) as pool:
        await ask(pool)
        began = asyncio.get_running_loop().time()
        with pytest.raises(UpstreamTimeoutError, match=r"within 0\.6 s"):
            await ask(pool, 0.6)
        assert asyncio.get_running_loop().time() - began < 0.9
        assert pool.resent == 1


async def test_idle_connection_closed_by_the_server_is_dropped() -> None:
    async with serving(answers(OK, then=hang_up)) as pool:
        await ask(pool)
        await until(lambda: not pool.live)
        assert await ask(pool) == (200, b"ok")


async def test_request_is_not_repeated_once_its_response_began() -> None:
    requests = 0

    async def script(peer: Peer) -> None:
        nonlocal requests
        while True:
            await peer.request()
            requests += 1
            if requests == 2:
                await peer.send(b"HTTP/1.1 2")
                return
            await peer.send(OK)

    async with serving(script) as pool:
        await ask(pool)
        with pytest.raises(UpstreamProtocolError):
            await ask(pool)
        assert requests == 2


async def test_broken_new_connection_is_not_replaced() -> None:
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1

    async with serving(script) as pool:
        with pytest.raises(UpstreamProtocolError):
            await ask(pool)
        assert connections == 1


async def streamed(pool: Pool) -> Connection:
    """An exchange whose last chunk has not arrived."""
    connection = await pool.exchange(REQUEST, 10)
    assert await connection.read(10) == b"[DONE]"
    return connection


async def test_connection_is_reused_after_the_last_chunk() -> None:
    proceed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"6\r\n[DONE]\r\n")
        await proceed.wait()
        await peer.send(b"0\r\n\r\n")
        await peer.request()
        await peer.send(OK)

    async with serving(script) as pool:
        connection = await streamed(pool)
        pool.release(connection, expect_last_chunk=True)
        proceed.set()
        await until(lambda: connection.complete)
        assert await ask(pool) == (200, b"ok")
        assert pool.opened == 1


async def test_waiting_for_the_last_chunk_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_pool, "LAST_CHUNK_WAIT_S", 0.01)
    async with serving(answers(CHUNKED, b"6\r\n[DONE]\r\n", then=stay_silent)) as pool:
        pool.release(await streamed(pool), expect_last_chunk=True)
        await until(lambda: not pool.live)


async def test_server_closes_instead_of_the_last_chunk() -> None:
    proceed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"6\r\n[DONE]\r\n")
        await proceed.wait()

    async with serving(script) as pool:
        pool.release(await streamed(pool), expect_last_chunk=True)
        proceed.set()
        await until(lambda: not pool.live)
        assert pool.awaiting_last_chunk == {}


@pytest.mark.parametrize("values", [{}, {"reuse": False}, {"reuse": False, "expect_last_chunk": True}])
async def test_unfinished_response_is_cancelled_by_closing(values: dict[str, bool]) -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"6\r\n[DONE]\r\n")
        await peer.closed()
        closed.set()

    async with serving(script) as pool:
        pool.release(await streamed(pool), **values)
        async with asyncio.timeout(10):
            await closed.wait()


async def test_cancelled_exchange_closes_its_connection() -> None:
    closed = asyncio.Event()
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.closed()
        closed.set()

    async with serving(script) as pool:
        task = asyncio.create_task(ask(pool))
        await asked.wait()
        task.cancel()
        async with asyncio.timeout(10):
            await closed.wait()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not pool.live)


async def test_no_descriptor_left_is_our_own_failure() -> None:
    async with serving(answers(OK)) as pool:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [socket.socket()]
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0].fileno() + 8, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(socket.socket())
            with pytest.raises(UpstreamLocalError):
                await pool.exchange(REQUEST, 10)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in taken:
                each.close()
        assert await ask(pool) == (200, b"ok")
