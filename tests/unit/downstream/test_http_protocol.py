"""Whatever a client sends, in whatever pieces, it gets well-formed responses, in order. On real connections:
tests/integration/downstream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import h11
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from tests.support.memory_connection import Connection
from xgen_proxy.downstream.direct_writer import direct_writer_for
from xgen_proxy.downstream.request_body import BodyBudget, read_body
from xgen_proxy.downstream.response_writer import ResponseWriter, send_error
from xgen_proxy.errors import ClientDisconnectedError, ProxyError

LIMIT = 50
POST = b"POST /%b HTTP/1.1\r\nhost: x\r\n"
TRAILERS = b"x-trailer: 1\r\nx-request-id: 2\r\ncontent-length: 3\r\n"
PARTS: dict[str, bytes] = {
    "get": b"GET /whole HTTP/1.1\r\nhost: x\r\n\r\n",
    "head": b"HEAD /stream HTTP/1.1\r\nhost: x\r\n\r\n",
    "http/1.0": b"POST /stream HTTP/1.0\r\ncontent-length: 2\r\n\r\n{}",
    "length": POST % b"whole" + b"content-length: 5\r\n\r\nhello",
    "stream": POST % b"stream" + b"content-length: 5\r\n\r\nhello",
    "close": POST % b"stream" + b"connection: close\r\ncontent-length: 5\r\n\r\nhello",
    "chunked": POST % b"whole" + b"transfer-encoding: chunked\r\n\r\n5;ext=1\r\nhello\r\n0\r\n\r\n",
    "trailers": POST % b"stream" + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n" + TRAILERS + b"\r\n",
    "too large": POST % b"whole" + b"content-length: 60\r\n\r\n" + b"x" * 60,
    "too large, chunked": POST % b"whole" + b"transfer-encoding: chunked\r\n\r\n3c\r\n%b\r\n0\r\n\r\n" % (b"x" * 60),
    "unread": POST % b"unread" + b"content-length: 5\r\n\r\nhello",
    "expects": POST % b"whole" + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\nhello",
    "upgrade": POST % b"whole" + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 5\r\n\r\nhello",
    "unfinished": POST % b"stream" + b"content-length: 500\r\n\r\nhello",
    "no chunk": POST % b"whole" + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
    "garbage": b"\x00\x01garbage\r\n\r\n",
    "long head": b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000,
}
LAST = ("unfinished", "long head")  # what follows would belong to it
SENT = st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5).filter(
    lambda sent: not any(name in LAST for name in sent[:-1])
)
CUTS = st.lists(st.integers(0, 600), max_size=8)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body, unless the path is /unread, and answers whole or as a stream."""
    headers = dict(scope["headers"])
    writer = ResponseWriter(send, direct_writer_for(scope))
    with BodyBudget().hold() as held:
        try:
            if scope["path"] != "/unread":
                await read_body(receive, headers, LIMIT, held)
        except ProxyError as error:
            await send_error(send, error, [])
            return
        except ClientDisconnectedError:
            return
    if scope["path"] != "/stream":
        await writer.whole([], b"{}")
    else:
        await writer.start([])
        for data in (b"data: 1\n\n", b"", b"data: 2\n\n"):
            await writer.send(data)
            await asyncio.sleep(0)
        await writer.end(b"data: [DONE]\n\n")
    assert not any(name in (b"x-trailer", b"x-request-id") for name, _ in scope["headers"])


@given(SENT, CUTS)
@example(["trailers", "stream"], [70, 90, 110])
@example(["unread", "no chunk"], [])
@example(["stream", "no chunk"], [60])
@example(["too large", "get"], [70])
@example(["unread", "garbage"], [50])
@example(["trailers", "long head"], [62])
def test_any_input_gets_well_formed_responses(sent: list[str], cuts: list[int]) -> None:
    written, closed, unhandled = asyncio.run(exchange(sent, cuts))
    assert unhandled == []
    check(written, closed, sent)


async def exchange(sent: Sequence[str], cuts: list[int]) -> tuple[bytes, bool, list[str]]:
    """What is written, whether the connection is closed, and what the loop's exception handler is told."""
    unhandled: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context["message"]))
    connection = Connection(app)
    data = b"".join(PARTS[name] for name in sent)
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for start, end in pairwise(places):
        if start < end:
            await connection.receive(data[start:end])
    for _ in range(50):
        await asyncio.sleep(0)
    transport = connection.transport
    closed = transport.closed or transport.ended
    transport.closed = True
    connection.protocol.connection_lost(None)
    await connection.finish()
    return transport.written, closed, unhandled


def check(written: bytes, closed: bool, sent: Sequence[str]) -> None:
    """Parses the responses, one for each request, strictly. Raises h11.RemoteProtocolError."""
    for name in sent:
        method = PARTS[name].split()[0].decode("latin-1")
        client = h11.Connection(h11.CLIENT)
        client.send(
            h11.Request(method=method if method in ("GET", "HEAD") else "POST", target="/", headers=[("host", "x")])
        )
        client.send(h11.EndOfMessage())
        if not written:
            return
        client.receive_data(written)
        if closed:
            client.receive_data(b"")
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return
        written, _ = client.trailing_data
        if client.their_state is h11.MUST_CLOSE:
            assert closed
            break
    assert written == b"", "bytes after the last response"
