"""Reading and parsing of bodies, without a socket. On real connections: tests/integration/downstream."""

from __future__ import annotations

import pytest
from starlette.types import Message

from xgen_proxy.downstream.request_body import read_body, read_json
from xgen_proxy.errors import BadRequestError, ClientDisconnectedError, RequestTooLargeError, UnsupportedMediaTypeError

JSON = {b"content-type": b"application/json"}
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


@pytest.mark.parametrize("headers", [{}, JSON, {b"content-type": b"Application/JSON; charset=utf-8"}])
def test_json_object(headers: dict[bytes, bytes]) -> None:
    assert read_json(b'{"a": 1}', headers) == {"a": 1}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 2000 + b"]" * 2000, "not valid JSON"),
        (b"[1]", "must be a JSON object, not list"),
        (b"null", "must be a JSON object"),
    ],
)
def test_anything_else_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        read_json(raw, JSON)


@pytest.mark.parametrize("media_type", [b"", b"text/plain", b"application/x-www-form-urlencoded"])
def test_other_media_types_are_refused(media_type: bytes) -> None:
    with pytest.raises(UnsupportedMediaTypeError):
        read_json(b"{}", {b"content-type": media_type})
