"""Streams, event for event."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from xgen_proxy.translation.chat import Failure, Finish, Piece, Reasoning, Text, ToolCallPiece, Usage
from xgen_proxy.translation.messages.stream import MessageStream

Json = dict[str, Any]


def stream() -> MessageStream:
    return MessageStream("req-1", "claude", prompt_tokens=12)


def read(data: bytes) -> list[Json]:
    """Each event's data; its name must be its type."""
    found = []
    for each in data.decode().split("\n\n")[:-1]:
        name, _, fields = each.partition("\n")
        found.append(orjson.loads(fields.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def run(*pieces: Piece) -> list[Json]:
    """The events without the first."""
    translation = stream()
    data = b"".join(map(translation.feed, pieces)) + translation.end()
    first, *events = read(data)
    assert first["type"] == "message_start"
    return events


def short(events: list[Json]) -> list[str]:
    """`start 0 text`, `text 0 Hi`, `stop 0`, …"""
    return [_short(event) for event in events]


def _short(event: Json) -> str:
    kind = event["type"]
    if kind == "content_block_start":
        block = event["content_block"]
        return " ".join(["start", str(event["index"]), block["type"], *([block["name"]] if "name" in block else [])])
    if kind == "content_block_delta":
        kind, value = event["delta"].values()
        return f"{kind.removesuffix('_delta')} {event['index']} {value}"
    if kind == "content_block_stop":
        return f"stop {event['index']}"
    return kind if kind != "message_delta" else f"end {event['delta']['stop_reason']}"


def call(index: int, arguments: str = "", name: str = "", id: str = "") -> ToolCallPiece:
    return ToolCallPiece(index, id, name, arguments)


END = "message_stop"


@pytest.mark.parametrize(
    ("pieces", "events"),
    [
        (
            [Text("Hel"), Text("lo"), Finish("stop"), Usage(5, 2)],
            ["start 0 text", "text 0 Hel", "text 0 lo", "stop 0", "end end_turn", END],
        ),
        ([Finish("stop")], ["start 0 text", "stop 0", "end end_turn", END]),
        ([Text("Hi"), Finish("length")], ["start 0 text", "text 0 Hi", "stop 0", "end max_tokens", END]),
        (
            [Reasoning("H"), Reasoning("m"), Text("Hi"), Finish("stop")],
            [
                "start 0 thinking", "thinking 0 H", "thinking 0 m", "signature 0 xgen-proxy", "stop 0",
                "start 1 text", "text 1 Hi", "stop 1", "end end_turn", END,
            ],
        ),
        (
            [Text("I read."), call(0, "", "read", "a"), call(0, '{"p":'), call(0, "1}"), Finish("tool_calls")],
            [
                "start 0 text", "text 0 I read.", "stop 0",
                "start 1 tool_use read", 'input_json 1 {"p":', "input_json 1 1}", "stop 1", "end tool_use", END,
            ],
        ),
        # in turn, as the engines send them: each block at once
        (
            [call(0, "{}", "f", "a"), call(1, "{}", "g", "b"), Text("and"), Finish("tool_calls")],
            [
                "start 0 tool_use f", "input_json 0 {}", "stop 0", "start 1 tool_use g", "input_json 1 {}", "stop 1",
                "start 2 text", "text 2 and", "stop 2", "end tool_use", END,
            ],
        ),
        # at once
        (
            [
                call(0, "", "f", "a"), call(1, "", "g", "b"), call(0, "{"), call(1, "["), Text("and"), call(0, "}"),
                call(1, "]"), Finish("tool_calls"),
            ],
            [
                "start 0 tool_use f", "input_json 0 {", "input_json 0 }", "stop 0",
                "start 1 tool_use g", "input_json 1 [", "input_json 1 ]", "stop 1",
                "start 2 text", "text 2 and", "stop 2", "end tool_use", END,
            ],
        ),
        # a space after the arguments' end opens no third block
        (
            [call(0, "{}", "f", "a"), call(1, "{}", "g", "b"), call(0, " "), call(0, " ", "f", "a"), Finish("stop")],
            [
                "start 0 tool_use f", "input_json 0 {}", "stop 0", "start 1 tool_use g", "input_json 1 {}", "stop 1",
                "end tool_use", END,
            ],
        ),
        # cut short
        (
            [call(0, '{"p":', "f", "a"), Finish("length")],
            ["start 0 tool_use f", 'input_json 0 {"p":', "stop 0", "end max_tokens", END],
        ),
    ],
)  # fmt: skip
def test_blocks(pieces: list[Piece], events: list[str]) -> None:
    assert short(run(*pieces)) == events


def test_the_first_event_has_an_estimate_of_the_input() -> None:
    [start] = read(stream().feed(Text("")))[:1]
    assert start["message"]["usage"]["input_tokens"] == 12
    assert start["message"] | {"usage": None} == {
        "id": "msg_req-1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": None,
    }


def test_the_last_has_the_exact_figures() -> None:
    [delta] = [event for event in run(Text("Hi"), Finish("stop", "END"), Usage(20, 3, 8)) if "usage" in event]
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert delta["usage"]["input_tokens"] == 12
    assert delta["usage"]["cache_read_input_tokens"] == 8
    assert delta["usage"]["output_tokens"] == 3


def test_without_usage_pieces_are_counted() -> None:
    [delta] = [event for event in run(Text("a"), Text("b"), Finish("stop")) if "usage" in event]
    assert (delta["usage"]["input_tokens"], delta["usage"]["output_tokens"]) == (12, 2)


def test_a_call_has_an_id() -> None:
    [start] = [event for event in run(call(3, "{}", "f"), Finish("stop")) if event["type"] == "content_block_start"]
    assert start["content_block"] == {"type": "tool_use", "id": "toolu_req-1_0", "name": "f", "input": {}}


def test_pings_before_and_between() -> None:
    translation = stream()
    names = [event["type"] for event in read(translation.ping() + translation.ping())]
    assert names == ["message_start", "ping", "ping"]
    assert [event["type"] for event in read(translation.feed(Text("Hi")))] == [
        "content_block_start",
        "content_block_delta",
    ]
    assert translation.ping() == b'event: ping\ndata: {"type":"ping"}\n\n'


def test_a_broken_stream_ends_with_an_error() -> None:
    translation = stream()
    translation.feed(Text("Hi"))
    [error] = read(translation.feed(Failure({"message": "gone", "type": "api_error", "code": "stream_broken"})))
    assert error["error"] == {"type": "api_error", "message": "gone"}
