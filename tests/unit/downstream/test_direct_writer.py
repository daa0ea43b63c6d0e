"""What is written past ASGI's send(), and the state it leaves behind."""

from __future__ import annotations

import asyncio
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from xgen_proxy.downstream.direct_writer import EXTENSION, DirectWriter, direct_writer_for


class Cycle(SimpleNamespace):
    """What Wire uses of uvicorn's RequestResponseCycle."""

    def __init__(self, **values: Any) -> None:
        self.written: list[bytes] = []
        self.closed: list[bool] = []
        self.over: list[bool] = []
        transport = SimpleNamespace(write=self.written.append, close=lambda: self.closed.append(True))
        super().__init__(
            written=self.written, closed=self.closed, over=self.over, transport=transport,
            flow=SimpleNamespace(write_paused=False), default_headers=[(b"date", b"now")], keep_alive=True,
            disconnected=False, response_started=False, response_complete=False, waiting_for_100_continue=True,
            chunked_encoding=None, message_event=asyncio.Event(), on_response=lambda: self.over.append(True),
        )  # fmt: skip
        self.__dict__.update(values)


def test_a_whole_answer() -> None:
    cycle = Cycle()
    DirectWriter(cycle).whole([(b"x-a", b"1")], b"{}")
    assert cycle.written == [b"HTTP/1.1 200 OK\r\ndate: now\r\nx-a: 1\r\ncontent-length: 2\r\n\r\n{}"]
    assert (cycle.response_started, cycle.response_complete, cycle.waiting_for_100_continue) == (True, True, False)
    assert (cycle.over, cycle.closed, cycle.message_event.is_set()) == ([True], [], True)


def test_a_stream_that_send_ends() -> None:
    cycle = Cycle()
    wire = DirectWriter(cycle)
    wire.start([])
    wire.chunk(b"data: x\n\n")
    assert cycle.written == [
        b"HTTP/1.1 200 OK\r\ndate: now\r\ntransfer-encoding: chunked\r\n\r\n",
        b"9\r\ndata: x\n\n\r\n",
    ]
    assert (cycle.chunked_encoding, cycle.response_started, cycle.response_complete) == (True, True, False)


def test_the_last_answer_on_a_connection() -> None:
    cycle = Cycle(keep_alive=False)
    DirectWriter(cycle).whole([], b"")
    assert b"connection: close\r\n" in cycle.written[0]
    assert cycle.closed == [True]


def test_nobody_is_there() -> None:
    cycle = Cycle(disconnected=True)
    wire = DirectWriter(cycle)
    wire.start([])
    wire.chunk(b"x")
    wire.whole([], b"x")
    assert (cycle.written, cycle.over) == ([], [])


def test_a_line_break_in_a_header_is_refused() -> None:
    cycle = Cycle()
    with pytest.raises(ValueError, match="line break"):
        DirectWriter(cycle).whole([(b"x-a", b"1\r\nx-evil: 2")], b"")
    assert (cycle.written, cycle.response_started) == ([], False)


def test_under_another_server_there_is_none() -> None:
    assert direct_writer_for({"type": "http"}) is None
    assert direct_writer_for({"type": "http", "extensions": {"http.response.trailers": {}}}) is None
    cycle = Cycle()
    assert direct_writer_for({"type": "http", "extensions": {EXTENSION: weakref.ref(cycle)}}) is not None
