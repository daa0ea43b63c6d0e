"""What the pass-through writes by itself, and what it leaves to the stream's reader."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xgen_proxy import sse
from xgen_proxy.downstream.direct_writer import DirectWriter
from xgen_proxy.downstream.pass_through import pass_through


class FakeWriter(DirectWriter):
    __slots__ = ("is_paused", "sent")

    def __init__(self) -> None:
        self.is_paused = False
        self.sent: list[bytes] = []

    @property
    def paused(self) -> bool:
        return self.is_paused

    def chunk(self, data: bytes) -> None:
        self.sent.append(data)


def chunk(text: str, finish: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **fields}, separators=(",", ":")).encode() + b"\n\n"


@pytest.mark.parametrize("data", [chunk("hel"), chunk("hel") + chunk("lo"), chunk('"finish_reason":"stop"\n\ndata: x')])
def test_unfinished_chunks_are_recorded_and_written(data: bytes) -> None:
    writer, recorded = FakeWriter(), list[bytes]()
    on_data = pass_through(writer, sse.EventSplitter(), recorded.append)
    assert on_data(data)
    assert writer.sent == recorded == [data]


def test_nothing_is_recorded_without_a_log() -> None:
    writer = FakeWriter()
    assert pass_through(writer, sse.EventSplitter(), None)(chunk("hel"))
    assert writer.sent == [chunk("hel")]


LEFT_TO_THE_READER = {
    "finish": chunk("", "stop"),
    "a chunk and the finish": chunk("hel") + chunk("", "stop"),
    "done": b"data: [DONE]\n\n",
    "a chunk and done": chunk("hel") + b"data: [DONE]\n\n",
    "error": b'data: {"error":{"message":"m"}}\n\n',
    "usage": b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
    "half an event": chunk("hel")[:-1],
    "an error that is no event": chunk("hel") + b'error: {"code":500}\n\n',
    "an event and a half": chunk("hel") + chunk("lo")[:20],
}


@pytest.mark.parametrize("data", LEFT_TO_THE_READER.values(), ids=LEFT_TO_THE_READER.keys())
def test_everything_else_is_left_to_the_reader(data: bytes) -> None:
    writer, recorded = FakeWriter(), list[bytes]()
    assert not pass_through(writer, sse.EventSplitter(), recorded.append)(data)
    assert writer.sent == recorded == []


def test_rest_of_an_event_is_left_to_the_reader() -> None:
    writer, splitter = FakeWriter(), sse.EventSplitter()
    on_data = pass_through(writer, splitter, None)
    splitter.feed(b"data: {")
    assert not on_data(chunk("hel"))
    splitter.feed(b"}\n\n")
    assert on_data(chunk("hel"))


def test_chunks_for_a_slow_client_are_left_to_the_reader() -> None:
    writer = FakeWriter()
    on_data = pass_through(writer, sse.EventSplitter(), None)
    writer.is_paused = True
    assert not on_data(chunk("hel"))
    writer.is_paused = False
    assert on_data(chunk("hel"))
