"""Which way each part of a response takes, and what is counted of it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from tests.support.memory_connection import Connection
from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import DirectWriter, Headers, direct_writer_for
from xgen_proxy.downstream.response_writer import EVENT_STREAM, JSON, ResponseWriter, send_error
from xgen_proxy.errors import BadRequestError

HEADERS = [(b"x-request-id", b"req-1")]
CHUNK = b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":null}]}\n\n'


class Sent:
    """Records what is sent, and by which way."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.direct: list[tuple[Any, ...]] = []

    async def send(self, message: Message) -> None:
        self.messages.append(message)


class FakeWriter(DirectWriter):
    __slots__ = ("calls", "is_paused")

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.is_paused = False
        self.calls = calls

    @property
    def paused(self) -> bool:
        return self.is_paused

    def start(self, headers: Headers) -> None:
        self.calls.append(("start", headers))

    def chunk(self, data: bytes) -> None:
        self.calls.append(("chunk", data))

    def whole(self, headers: Headers, body: bytes) -> None:
        self.calls.append(("whole", headers, body))


class Log:
    def __init__(self) -> None:
        self.blocks: list[bytes] = []

    def add(self, block: bytes) -> None:
        self.blocks.append(block)

    @property
    def size(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def count(self) -> int:
        return len(self.blocks)


def start_message(headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body_message(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def test_whole_response_by_send() -> None:
    sent = Sent()
    writer = ResponseWriter(sent.send, None)
    assert (writer.status, writer.first_output, writer.bytes_sent) == (0, 0, None)
    await writer.whole(HEADERS, b"{}")
    assert sent.messages == [
        start_message([JSON, *HEADERS, (b"content-length", b"2")]),
        body_message(b"{}", more=False),
    ]
    assert (writer.status, writer.bytes_sent, writer.chunks) == (200, 2, None)
    assert 0 < writer.first_output <= time.perf_counter()


async def test_whole_response_directly() -> None:
    sent = Sent()
    writer = ResponseWriter(sent.send, FakeWriter(sent.direct))
    await writer.whole(HEADERS, b"{}")
    assert sent.direct == [("whole", [JSON, *HEADERS], b"{}")]
    assert sent.messages == []
    assert (writer.status, writer.bytes_sent) == (200, 2)


async def test_whole_response_to_a_slow_client_by_send() -> None:
    sent = Sent()
    direct = FakeWriter(sent.direct)
    direct.is_paused = True
    await ResponseWriter(sent.send, direct).whole(HEADERS, b"{}")
    assert sent.direct == []
    assert len(sent.messages) == 2


async def test_stream_by_send() -> None:
    sent = Sent()
    writer = ResponseWriter(sent.send, None)
    writer.sent_log = log = Log()
    await writer.start(HEADERS)
    await writer.send(CHUNK)
    await writer.comment("resumed")
    await writer.end(sse.DONE)
    assert sent.messages == [
        start_message([*EVENT_STREAM, *HEADERS]),
        body_message(CHUNK, more=True),
        body_message(b": resumed\n\n", more=True),
        body_message(sse.DONE, more=False),
    ]
    assert log.blocks == [CHUNK], "comments and the end are not part of the response"
    assert (writer.bytes_sent, writer.chunks) == (len(CHUNK), 1)
    assert writer.pass_through(sse.EventSplitter()) is None


async def test_stream_directly() -> None:
    sent = Sent()
    direct = FakeWriter(sent.direct)
    writer = ResponseWriter(sent.send, direct)
    writer.sent_log = log = Log()
    await writer.start(HEADERS)
    await writer.send(CHUNK)
    on_data = writer.pass_through(sse.EventSplitter())
    assert on_data is not None
    assert on_data(CHUNK)
    direct.is_paused = True
    await writer.send(CHUNK)
    await writer.end()
    assert sent.direct == [("start", [*EVENT_STREAM, *HEADERS]), ("chunk", CHUNK), ("chunk", CHUNK)]
    assert sent.messages == [body_message(CHUNK, more=True), body_message(b"", more=False)]
    assert log.blocks == [CHUNK] * 3
    assert (writer.bytes_sent, writer.chunks) == (3 * len(CHUNK), 3)


async def test_stream_without_a_log_is_not_counted() -> None:
    sent = Sent()
    writer = ResponseWriter(sent.send, FakeWriter(sent.direct))
    await writer.start(HEADERS)
    await writer.send(CHUNK)
    on_data = writer.pass_through(sse.EventSplitter())
    assert on_data is not None
    assert on_data(CHUNK)
    assert sent.direct[1:] == [("chunk", CHUNK)] * 2
    assert (writer.bytes_sent, writer.chunks) == (None, None)


async def test_failure_before_the_response_is_a_response() -> None:
    sent, expected = Sent(), Sent()
    error = BadRequestError("wrong")
    await ResponseWriter(sent.send, FakeWriter(sent.direct)).fail(error, HEADERS)
    await send_error(expected.send, error, HEADERS)
    assert sent.messages == expected.messages
    assert sent.direct == []


async def test_failure_in_a_stream_is_its_last_event() -> None:
    sent = Sent()
    writer = ResponseWriter(sent.send, None)
    await writer.start(HEADERS)
    error = BadRequestError("wrong")
    await writer.fail(error, HEADERS)
    assert sent.messages[1:] == [body_message(error.event(), more=False)]


@pytest.mark.parametrize("headers", [[], HEADERS])
async def test_error(headers: list[tuple[bytes, bytes]]) -> None:
    sent = Sent()
    error = BadRequestError("wrong", param="model")
    await send_error(sent.send, error, headers)
    start, body = sent.messages
    assert start["status"] == 400
    assert start["headers"] == [*error.headers(), (b"content-length", b"%d" % len(error.body())), *headers]
    assert body == {"type": "http.response.body", "body": error.body()}


async def test_empty_events_are_neither_sent_nor_recorded() -> None:
    sent = Sent()
    writer = ResponseWriter(sent.send, FakeWriter(sent.direct))
    writer.sent_log = log = Log()
    await writer.start(HEADERS)
    await writer.send(b"")
    assert [call[0] for call in sent.direct] == ["start"]
    assert log.blocks == []


async def test_nothing_is_sent_after_the_end() -> None:
    sent = Sent()
    writer = ResponseWriter(sent.send, FakeWriter(sent.direct))
    writer.sent_log = log = Log()
    await writer.start(HEADERS)
    await writer.end(sse.DONE)
    before = len(sent.messages), len(sent.direct)
    await writer.send(CHUNK)
    await writer.comment("late")
    await writer.fail(BadRequestError("late"), HEADERS)
    await writer.end()
    assert (len(sent.messages), len(sent.direct)) == before
    assert log.blocks == []


# Any sequence of calls makes well-formed HTTP

CALLS = st.one_of(
    st.tuples(st.sampled_from(["send", "direct", "pass_through", "end"]), st.sampled_from([b"", CHUNK, b"x", b"0"])),
    st.tuples(st.sampled_from(["start", "fail", "comment", "slow", "whole"]), st.just(b"{}")),
)
METHODS = st.sampled_from(["POST", "GET", "HEAD"])
VERSIONS = st.sampled_from(["1.1", "1.0"])


@given(st.lists(CALLS, max_size=8), METHODS, VERSIONS)
@example([("start", b""), ("send", b""), ("direct", b""), ("send", CHUNK), ("end", b"")], "POST", "1.1")
@example([("start", b""), ("end", b""), ("send", CHUNK), ("direct", CHUNK), ("fail", b"")], "POST", "1.1")
@example([("start", b""), ("send", CHUNK), ("end", b"x")], "POST", "1.0")
@example([("whole", b"{}")], "HEAD", "1.1")
def test_any_calls_make_well_formed_http(calls: list[tuple[str, bytes]], method: str, version: str) -> None:
    written, closed, sent = asyncio.run(respond(calls, method, version))
    parsed, complete = parse(written, closed, method)
    if sent is not None and method != "HEAD":
        assert parsed == sent
    if version == "1.0":
        assert b"transfer-encoding" not in written
        assert closed
    assert complete or closed


async def respond(calls: list[tuple[str, bytes]], method: str, version: str) -> tuple[bytes, bool, bytes | None]:
    """What an app that makes these calls writes, whether the connection was closed, and the body it meant to send."""
    sent: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        writer = ResponseWriter(send, direct_writer_for(scope))
        for call, data in calls:
            try:
                sent.append(await make(call, data, writer, direct_writer_for(scope), connection))
            except RuntimeError:  # out of order
                continue

    connection = Connection(app)
    connection.protocol.data_received(f"{method} / HTTP/{version}\r\nhost: x\r\n\r\n".encode())
    await connection.finish()
    meant = (
        b"".join(sent) if connection.cycle.response_complete and b" 200 OK" in connection.transport.written else None
    )
    connection.protocol.connection_lost(None)
    return connection.transport.written, connection.transport.closed, meant


async def make(
    call: str, data: bytes, writer: ResponseWriter, direct: DirectWriter | None, connection: Connection
) -> bytes:
    """The bytes that the call adds to the body."""
    ended = connection.cycle.response_complete
    if call == "start":
        await writer.start(HEADERS)
        return b""
    if call == "slow":
        connection.protocol.pause_writing()
        asyncio.get_running_loop().call_soon(connection.protocol.resume_writing)
        return b""
    if call == "direct":
        if direct is None:
            return b""
        direct.chunk(data)
        return data
    if call == "pass_through":
        on_data = writer.pass_through(sse.EventSplitter())
        return data if on_data is not None and on_data(data) else b""
    if call == "comment":
        await writer.comment("resumed")
        return b"" if ended else sse.comment("resumed")
    if call == "fail":
        error, streaming = BadRequestError("wrong"), bool(writer.status)
        await writer.fail(error, HEADERS)
        return error.event() if streaming and not ended else b""
    if call == "whole":
        await writer.whole(HEADERS, data)
    elif call == "send":
        await writer.send(data)
    else:
        await writer.end(data)
    return b"" if ended else data


def parse(written: bytes, closed: bool, method: str) -> tuple[bytes, bool]:
    """The body of the one response, and whether it is complete. Raises h11.RemoteProtocolError."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(written)
    body = b""
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            if not closed or b"\r\ntransfer-encoding: " in written or b"\r\ncontent-length: " in written:
                return body, False
            client.receive_data(b"")  # the end of the connection
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert client.trailing_data[0] == b""
            return body, True
        elif isinstance(event, h11.ConnectionClosed):
            return body, False
