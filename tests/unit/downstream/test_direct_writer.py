"""The contract of the direct writer with the installed uvicorn: each response is sent twice through uvicorn's own
RequestResponseCycle, once with ASGI's send() and once with the direct writer, and nothing may differ."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support.memory_connection import Connection
from xgen_proxy.downstream.direct_writer import DirectWriter, direct_writer_for

HEADERS = [(b"content-type", b"application/json"), (b"x-request-id", b"req-1")]


def writer(scope: Scope) -> DirectWriter:
    direct = direct_writer_for(scope)
    assert direct is not None
    return direct


def body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def whole_by_send(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [*HEADERS, (b"content-length", b"11")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send(body(b'{"text":""}', more=False))


async def whole_directly(scope: Scope, receive: Receive, send: Send) -> None:
    writer(scope).whole(HEADERS, b'{"text":""}')


async def stream_by_send(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    for data in (b"data: 1\n\n", b"data: %s\n\n" % (b"x" * 5000), b"data: 3\n\n"):
        await send(body(data, more=True))
    await send(body(b"data: [DONE]\n\n", more=False))


async def stream_directly(scope: Scope, receive: Receive, send: Send) -> None:
    direct = writer(scope)
    direct.start(HEADERS)
    direct.chunk(b"data: 1\n\n")
    direct.chunk(b"data: %s\n\n" % (b"x" * 5000))
    direct.chunk(b"data: 3\n\n")
    await send(body(b"data: [DONE]\n\n", more=False))


async def stream_by_both(scope: Scope, receive: Receive, send: Send) -> None:
    direct = writer(scope)
    direct.start(HEADERS)
    direct.chunk(b"data: 1\n\n")
    await send(body(b"data: %s\n\n" % (b"x" * 5000), more=True))
    direct.chunk(b"data: 3\n\n")
    await send(body(b"data: [DONE]\n\n", more=False))


REQUESTS = {
    "keep-alive": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
    "close": b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}",
    "expects 100": b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n",
    "pipelined": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}" * 3,
}
APPS = {
    "whole": (whole_by_send, whole_directly),
    "stream": (stream_by_send, stream_directly),
    "stream, by both": (stream_by_send, stream_by_both),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
@pytest.mark.parametrize(("by_send", "directly"), APPS.values(), ids=APPS.keys())
async def test_same_bytes_and_state_as_send(request_: bytes, by_send: ASGIApp, directly: ASGIApp) -> None:
    outcomes = []
    for app in (by_send, directly):
        connection = Connection(app)
        connection.protocol.data_received(request_)
        await connection.finish()
        outcomes.append(connection.outcome())
        connection.protocol.connection_lost(None)
    expected, found = outcomes
    assert found == expected
    assert found["response_complete"]
    assert found["total_requests"] == found["written"].count(b"HTTP/1.1 200 OK\r\n") == request_.count(b"POST")


@pytest.mark.parametrize(("by_send", "directly"), APPS.values(), ids=APPS.keys())
async def test_same_while_the_server_shuts_down(by_send: ASGIApp, directly: ASGIApp) -> None:
    outcomes = []
    for app in (by_send, directly):
        connection = Connection(app)
        connection.protocol.data_received(REQUESTS["keep-alive"])
        connection.protocol.shutdown()
        await connection.finish()
        outcomes.append(connection.outcome())
        connection.protocol.connection_lost(None)
    expected, found = outcomes
    assert found == expected
    assert b"connection: close\r\n" in found["written"]
    assert found["closed"]


@pytest.mark.parametrize(("by_send", "directly"), APPS.values(), ids=APPS.keys())
async def test_same_after_the_client_disconnected(by_send: ASGIApp, directly: ASGIApp) -> None:
    outcomes = []
    for app in (by_send, directly):
        connection = Connection(app)
        connection.protocol.data_received(REQUESTS["keep-alive"])
        connection.protocol.connection_lost(None)
        await connection.finish()
        outcomes.append(connection.outcome())
    expected, found = outcomes
    assert found == expected
    assert found["written"] == b""


async def test_paused_is_when_send_would_wait() -> None:
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        direct = writer(scope)
        seen.append(direct.paused)
        connection.protocol.pause_writing()
        seen.append(direct.paused)
        connection.protocol.resume_writing()
        seen.append(direct.paused)
        direct.whole(HEADERS, b"{}")

    connection = Connection(app)
    connection.protocol.data_received(REQUESTS["keep-alive"])
    await connection.finish()
    assert seen == [False, True, False]
    connection.protocol.connection_lost(None)


@pytest.mark.parametrize("header", [(b"x-a", b"1\r\nx-evil: 2"), (b"x-a\n", b"1"), (b"x-a", b"1\r"), (b"x-a", b"\0")])
async def test_control_character_in_a_header_is_refused(header: tuple[bytes, bytes]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(ValueError, match="control character"):
            writer(scope).whole([header], b"")
        with pytest.raises(ValueError, match="control character"):
            writer(scope).start([header])
        assert connection.transport.written == b""
        assert not connection.cycle.response_started
        await whole_by_send(scope, receive, send)

    connection = Connection(app)
    connection.protocol.data_received(REQUESTS["keep-alive"])
    await connection.finish()
    assert connection.transport.written.startswith(b"HTTP/1.1 200 OK\r\n")
    connection.protocol.connection_lost(None)


def test_other_servers_offer_no_direct_writer() -> None:
    assert direct_writer_for({"type": "http"}) is None
    assert direct_writer_for({"type": "http", "extensions": {"http.response.trailers": {}}}) is None


async def test_empty_chunk_does_not_end_the_response() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        direct = writer(scope)
        direct.start(HEADERS)
        before = connection.transport.written
        direct.chunk(b"")
        assert connection.transport.written == before
        await send(body(b"data: [DONE]\n\n", more=False))

    connection = Connection(app)
    connection.protocol.data_received(REQUESTS["keep-alive"])
    await connection.finish()
    assert connection.transport.written.endswith(b"\r\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    connection.protocol.connection_lost(None)


async def test_calls_out_of_order_write_nothing() -> None:
    """uvicorn swallows what an application raises after its response, a failed assertion too."""
    done = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        direct = writer(scope)
        with pytest.raises(RuntimeError, match="outside a stream"):
            direct.chunk(b"x")
        assert connection.transport.written == b""
        await whole_directly(scope, receive, send)
        before = connection.transport.written
        with pytest.raises(RuntimeError, match="outside a stream"):
            direct.chunk(b"x")
        with pytest.raises(RuntimeError, match="second head"):
            direct.start(HEADERS)
        with pytest.raises(RuntimeError, match="second head"):
            direct.whole(HEADERS, b"{}")
        assert connection.transport.written == before
        done.set()

    connection = Connection(app)
    connection.protocol.data_received(REQUESTS["keep-alive"])
    await connection.finish()
    assert done.is_set()
    connection.protocol.connection_lost(None)


@pytest.mark.parametrize("start", ["GET / HTTP/1.1", "HEAD / HTTP/1.1", "POST / HTTP/1.0", "PUT / HTTP/1.1"])
async def test_only_a_post_over_http_1_1_is_offered_one(start: str) -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(direct_writer_for(scope))
        await whole_by_send(scope, receive, send)

    connection = Connection(app)
    connection.protocol.data_received(f"{start}\r\nhost: x\r\n\r\n".encode())
    await connection.finish()
    assert seen == [None]
    connection.protocol.connection_lost(None)
