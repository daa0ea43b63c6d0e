"""Reading of bodies, without a socket. On real connections: tests/integration/downstream."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message
from starlette.types import Receive as ReceiveType

from xgen_proxy.downstream.request_body import BodyBudget
from xgen_proxy.downstream.request_body import read_body as read_body_held
from xgen_proxy.errors import (
    ClientDisconnectedError,
    QueueFullError,
    RequestTooLargeError,
    UnsupportedMediaTypeError,
)

BUDGET = BodyBudget(1000)


async def read_body(
    receive: ReceiveType, headers: Mapping[bytes, bytes], limit: int, budget: BodyBudget = BUDGET
) -> bytes:
    with budget.hold() as held:
        return await read_body_held(receive, headers, limit, held)


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


# The encoding of a body


@pytest.mark.parametrize("encoding", [b"gzip", b"zstd", b"br", b"deflate, gzip", b"x" * 500])
async def test_compressed_body_is_refused_before_it_is_read(encoding: bytes) -> None:
    receive = Receive(part(b"x"))
    with pytest.raises(UnsupportedMediaTypeError, match="Content-Encoding: ") as refusal:
        await read_body(receive, {b"content-encoding": encoding}, 100)
    assert len(refusal.value.message) < 150
    assert (b"accept-encoding", b"identity") in refusal.value.headers()
    assert len(receive.messages) == 1


@pytest.mark.parametrize("encoding", [b"identity", b"Identity", b""])
async def test_body_with_the_encoding_identity(encoding: bytes) -> None:
    assert await read_body(Receive(part(b"x")), {b"content-encoding": encoding}, 100) == b"x"


# The budget


async def test_bytes_are_held_until_the_request_ends() -> None:
    budget = BodyBudget(10)
    with budget.hold() as held:
        await read_body_held(Receive(part(b"abc", more=True), part(b"de")), {}, 10, held)
        assert budget.used == 5
    assert budget.used == 0


async def test_body_that_does_not_fit_is_refused_before_it_is_read() -> None:
    budget = BodyBudget(10)
    with budget.hold() as held:
        held.grow_to(6)
        receive = Receive(part(b"x" * 5))
        with pytest.raises(QueueFullError) as refusal:
            await read_body(receive, {b"content-length": b"5"}, 10, budget)
        assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
        assert len(receive.messages) == 1
        assert budget.used == 6


async def test_chunked_body_is_refused_once_it_does_not_fit() -> None:
    budget = BodyBudget(10)
    with budget.hold() as held:
        held.grow_to(6)
        receive = Receive(part(b"abc", more=True), part(b"de", more=True), part(b"f"))
        with pytest.raises(QueueFullError):
            await read_body(receive, {}, 10, budget)
        assert len(receive.messages) == 1
        assert budget.used == 6


async def test_announced_bytes_keep_nobody_out() -> None:
    budget = BodyBudget(10)
    with budget.hold() as held:
        held.check(10)
        assert budget.used == 0


async def test_body_that_is_alone_always_fits() -> None:
    budget = BodyBudget(3)
    assert await read_body(Receive(part(b"abcdef")), {b"content-length": b"6"}, 10, budget) == b"abcdef"
    assert budget.used == 0


@given(st.lists(st.lists(st.binary(max_size=8), min_size=1, max_size=4), max_size=8), st.booleans())
def test_the_budget_is_exact(bodies: list[list[bytes]], leaves: bool) -> None:
    """Whatever comes, no more than the limit is held, and all of it is given back."""
    budget = BodyBudget(20)

    async def request(parts: list[bytes]) -> None:
        messages = [part(each, more=True) for each in parts[:-1]]
        receive = SlowReceive(*messages, DISCONNECT if leaves else part(parts[-1]))
        with budget.hold() as held:
            try:
                await read_body_held(receive, {}, 16, held)
                assert held.size == sum(map(len, parts)) <= budget.used <= budget.limit
                await asyncio.sleep(0)
            except (QueueFullError, RequestTooLargeError, ClientDisconnectedError):
                assert budget.used <= budget.limit

    async def all_at_once() -> None:
        await asyncio.gather(*map(request, bodies))

    asyncio.run(all_at_once())
    assert budget.used == 0


class SlowReceive(Receive):
    async def __call__(self) -> Message:
        await asyncio.sleep(0)
        return await super().__call__()
