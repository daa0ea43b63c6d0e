"""Reading of bodies, without a socket. On real connections: tests/integration/downstream."""

from __future__ import annotations

import pytest
from starlette.types import Message

from xgen_proxy.downstream.request_body import read_body
from xgen_proxy.errors import ClientDisconnectedError, RequestTooLargeError

DISCONNECT: Message = {"type": "http.disconnect"}


class Receive:
    """An ASGI receive() with these messages."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)

    async def __call__(self) -> Message:
        return self.messages.pop(0)


def part(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_body_in_one_part_is_not_copied() -> None:
    body = b"x" * 100
    assert await read_body(Receive(part(body)), {}, 100) is body


async def test_parts_are_joined() -> None:
    receive = Receive(part(b"ab", more=True), {"type": "http.request", "more_body": True}, part(b"cd"))
    assert await read_body(receive, {}, 4) == b"abcd"


async def test_too_large_by_its_header_is_not_read() -> None:
    receive = Receive(part(b"x"))
    with pytest.raises(RequestTooLargeError, match="has 5 bytes; the limit is 4"):
        await read_body(receive, {b"content-length": b"5"}, 4)
    assert len(receive.messages) == 1


async def test_reading_stops_at_the_limit() -> None:
    receive = Receive(part(b"abc", more=True), part(b"de", more=True), part(b"f"))
    with pytest.raises(RequestTooLargeError, match="more than 4 bytes"):
        await read_body(receive, {}, 4)
    assert len(receive.messages) == 1


async def test_disconnect_while_reading() -> None:
    with pytest.raises(ClientDisconnectedError):
        await read_body(Receive(part(b"ab", more=True), DISCONNECT), {}, 4)
