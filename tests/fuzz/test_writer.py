"""Any sequence of calls gives well-formed HTTP, as a strict parser reads it."""

from __future__ import annotations

import contextlib
import random

import h11
from starlette.types import Receive, Scope, Send

from tests.support.fuzzing import examples, reported
from tests.support.memory_connection import Connection
from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import direct_writer_for
from xgen_proxy.downstream.response_writer import ResponseWriter
from xgen_proxy.errors import BadGatewayError

REQUEST = b"POST /%d HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
EVENTS = [b"", b"", b"data: {}\n\n", b"0\r\n\r\n", b"\r\n", b": waiting\n\n", bytes(range(256)), b"x" * 70_000]
ERROR = BadGatewayError("broken", code="stream_broken")
HEADERS = [(b"x-request-id", b"id")]
CALLS = ("start", "whole", "send", "send", "send", "pass", "pass", "comment", "end", "fail")
REFUSED = (RuntimeError, ValueError, AttributeError)  # a call that makes no sense there


class Answer:
    """Makes random calls, then ends. `body`: what a client should receive."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.calls: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls.append(f"request {scope['path']}")
        direct = direct_writer_for(scope) if self.rng.random() < 0.8 else None
        writer = ResponseWriter(send, direct)
        plausible = self.rng.random() < 0.7
        for number in range(self.rng.randrange(8)):
            name = "start" if plausible and number == 0 else self.rng.choice(CALLS)
            if plausible and number and name in ("start", "whole"):
                continue
            self.calls.append(name)
            with contextlib.suppress(*REFUSED):
                await self.call(writer, name)
        with contextlib.suppress(*REFUSED):
            await (writer.end() if writer.status else writer.fail(ERROR, HEADERS))

    async def call(self, writer: ResponseWriter, name: str) -> None:
        data = self.rng.choice(EVENTS)
        if name == "start":
            await writer.start(HEADERS)
        elif name == "whole":
            await writer.whole(HEADERS, data)
        elif name == "send":
            await writer.send(data)
        elif name == "pass":
            on_data = writer.pass_through(sse.EventSplitter())
            if on_data is not None:
                on_data(b'data: {"finish_reason":null}\n\n')
        elif name == "comment":
            await writer.comment("a comment\nof two lines")
        elif name == "end":
            await writer.end(data)
        else:
            await writer.fail(ERROR, HEADERS)


def read(written: bytes, count: int) -> list[tuple[int, bytes]]:
    """(status, body) of each response. Raises RemoteProtocolError if they are malformed or more than `count`."""
    client = h11.Connection(h11.CLIENT)
    found: list[tuple[int, bytes]] = []
    client.receive_data(written)
    client.receive_data(b"")
    for _ in range(count):
        client.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
        client.send(h11.EndOfMessage())
        status, body = 0, b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                raise AssertionError(f"{event} after {found}")
        found.append((status, body))
        if client.our_state is h11.MUST_CLOSE:
            break
        client.start_next_cycle()
    assert client.trailing_data[0] == b"", "bytes after the last response"
    return found


async def test_any_calls_give_well_formed_responses() -> None:
    for rng in examples():
        answer = Answer(rng)
        connection = Connection(answer)
        with reported(answer.calls):
            requests = rng.choice((1, 2))
            for number in range(requests):
                if connection.transport.closed:
                    break
                connection.protocol.data_received(REQUEST % number)
                await connection.finish()
            with reported(connection.transport.written[:2000]):
                found = read(connection.transport.written, len([c for c in answer.calls if c.startswith("request")]))
                assert all(status in (200, 500, 502) for status, _ in found)
