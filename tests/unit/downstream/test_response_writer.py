"""Which way each part of a response takes, and what is counted of it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from starlette.types import Message

from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import DirectWriter, Headers
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
    assert sent.messages[1:] == [{"type": "http.response.body", "body": error.event()}]


@pytest.mark.parametrize("headers", [[], HEADERS])
async def test_error(headers: list[tuple[bytes, bytes]]) -> None:
    sent = Sent()
    error = BadRequestError("wrong", param="model")
    await send_error(sent.send, error, headers)
    start, body = sent.messages
    assert start["status"] == 400
    assert start["headers"] == [*error.headers(), (b"content-length", b"%d" % len(error.body())), *headers]
    assert body == {"type": "http.response.body", "body": error.body()}
