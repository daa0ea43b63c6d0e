"""Pieces of a chat as events of a response."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai._models import validate_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent

from xgen_proxy import sse
from xgen_proxy.translation.chat import Failure, Finish, Piece, Reasoning, Text, ToolCallPiece, Usage
from xgen_proxy.translation.responses.response import ResponseHead
from xgen_proxy.translation.responses.stream import ResponseStream
from xgen_proxy.translation.responses.tools import read_tools

SENT = {
    "model": "m",
    "input": "Hi",
    "tools": [
        {"type": "function", "name": "f", "parameters": {}, "strict": False},
        {"type": "custom", "name": "patch"},
    ],
}
BEGIN = ["created", "in_progress"]
TEXT_BEGIN = ["output_item.added", "content_part.added"]
TEXT_END = ["output_text.done", "content_part.done", "output_item.done"]
THOUGHT_END = ["reasoning_text.done", *TEXT_END[1:]]
CALL_END = ["function_call_arguments.done", "output_item.done"]


def stream() -> ResponseStream:
    return ResponseStream(ResponseHead(SENT, "m"), read_tools(SENT))


def events_of(block: bytes) -> list[dict[str, Any]]:
    """Each event must have its name twice, and be what the SDK's strictest reading accepts."""
    found = []
    for event in sse.events(block):
        name, data = event.split(b"\n")[:2]
        found.append(orjson.loads(data.removeprefix(b"data: ")))
        assert name.removeprefix(b"event: ").decode() == found[-1]["type"]
        validate_type(type_=ResponseStreamEvent, value=found[-1])  # type: ignore[arg-type]
    return found


def play(*pieces: Piece, end: bool = True) -> list[dict[str, Any]]:
    """All events of a stream, which must have the numbers from 0 on."""
    translation = stream()
    block = b"".join(translation.feed(piece) for piece in pieces)
    events = events_of(block + translation.end() if end else block)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def more(arguments: str) -> ToolCallPiece:
    return ToolCallPiece(0, "", "", arguments)


LOGPROB = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": []}

CASES: list[tuple[list[Piece], list[str]]] = [
    ([], [*BEGIN, *TEXT_BEGIN, *TEXT_END, "completed"]),
    ([Text("Hel"), Text("lo")], [*BEGIN, *TEXT_BEGIN, *["output_text.delta"] * 2, *TEXT_END, "completed"]),
    (
        [Reasoning("Hm"), Text("Hi")],
        [*BEGIN, *TEXT_BEGIN, "reasoning_text.delta", *THOUGHT_END,
         *TEXT_BEGIN, "output_text.delta", *TEXT_END, "completed"],
    ),
    (
        [Text("\n\n"), ToolCallPiece(0, "a", "f", ""), more('{"x":'), more("1}")],
        [*BEGIN, "output_item.added", *["function_call_arguments.delta"] * 2, *CALL_END, "completed"],
    ),
    (
        [ToolCallPiece(0, "a", "f", ""), ToolCallPiece(1, "b", "f", "{}")],
        [*BEGIN, "output_item.added", "function_call_arguments.delta", *CALL_END,
         "output_item.added", "function_call_arguments.delta", *CALL_END, "completed"],
    ),
    (
        [ToolCallPiece(0, "a", "patch", '{"input": "*** Be'), more("gin\\n"), more('"}')],
        [*BEGIN, "output_item.added", *["custom_tool_call_input.delta"] * 2, "custom_tool_call_input.done",
         "output_item.done", "completed"],
    ),
    (
        [ToolCallPiece(0, "a", "patch", "*** Begin"), Text("Done"), Finish("stop"), Usage(1, 2)],
        [*BEGIN, "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done",
         *TEXT_BEGIN, "output_text.delta", *TEXT_END, "completed"],
    ),
    ([Text("Hel"), Finish("length")], [*BEGIN, *TEXT_BEGIN, "output_text.delta", *TEXT_END, "incomplete"]),
]  # fmt: skip


@pytest.mark.parametrize(("pieces", "expected"), CASES)
def test_the_order_of_events(pieces: list[Piece], expected: list[str]) -> None:
    assert kinds(play(*pieces)) == expected


@pytest.mark.parametrize("pieces", [pieces for pieces, _ in CASES])
def test_deltas_join_to_the_items_and_these_to_the_response(pieces: list[Piece]) -> None:
    events = play(*pieces)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == done
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["item"]["id"] for event in added] == [item["id"] for item in done]
    assert [event["output_index"] for event in added] == list(range(len(done)))
    for item in done:
        deltas = "".join(e["delta"] for e in events if e["type"].endswith(".delta") and e["item_id"] == item["id"])
        texts = [part["text"] for part in item.get("content", ())]
        assert deltas == (texts[0] if texts else item.get("arguments", item.get("input")))


@pytest.mark.parametrize("pieces", [pieces for pieces, _ in CASES])
def test_the_sdk_accumulates_the_events(pieces: list[Piece]) -> None:
    from openai._models import construct_type
    from openai._types import omit

    state = ResponseStreamState[Any](input_tools=omit, text_format=omit)
    for event in play(*pieces):
        state.handle_event(construct_type(type_=ResponseStreamEvent, value=event))  # type: ignore[arg-type]


def test_the_first_event_has_no_output_and_the_last_has_the_usage() -> None:
    events = play(Text("Hi"), Finish("stop"), Usage(9, 4, 8, 3))
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["usage"] is None
    assert events[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] == 8
    assert events[-1]["response"]["status"] == "completed"
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1


def test_probabilities_of_tokens() -> None:
    events = play(Text("\n", ({**LOGPROB, "token": "\n"},)), Text("Hi", (LOGPROB,)))
    [delta] = [event for event in events if "delta" in event]
    assert [each["token"] for each in delta["logprobs"]] == ["\n", "Hi"]
    [part] = events[-1]["response"]["output"][0]["content"]
    assert part["logprobs"] == delta["logprobs"]


def test_white_space_belongs_to_the_text_that_follows() -> None:
    events = play(Text("\n"), Text("\n"), Text("Hi"), Text("\n"))
    assert [event["delta"] for event in events if "delta" in event] == ["\n\nHi", "\n"]


def test_an_answer_that_was_cut() -> None:
    last = play(ToolCallPiece(0, "a", "f", '{"x'), Finish("length"))[-1]["response"]
    assert (last["status"], last["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert last["output"][0]["status"] == "incomplete"


def test_a_broken_stream_leaves_no_half_item() -> None:
    """Codex takes what output_item.done says for complete."""
    broken = Failure({"message": "no replica", "type": "api_error", "code": "all_backends_failed"})
    events = play(Reasoning("Hm"), ToolCallPiece(0, "a", "f", '{"x'), broken, end=False)
    assert kinds(events)[-1] == "failed"
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "no replica"}
    assert [item["type"] for item in response["output"]] == ["reasoning"]


def test_a_failure_may_be_all_there_is() -> None:
    assert kinds(play(Failure({"message": "no"}), end=False)) == [*BEGIN, "failed"]


def test_pings_are_events_that_say_nothing_new() -> None:
    translation = stream()
    block = (
        translation.ping() + translation.ping() + translation.feed(Text("Hi")) + translation.ping() + translation.end()
    )
    events = events_of(block)
    assert kinds(events) == [
        *BEGIN, "in_progress", *TEXT_BEGIN, "output_text.delta", "in_progress", *TEXT_END, "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_calls_whose_pieces_alternate_are_whole() -> None:
    """A client takes each call from its output_item.done."""
    events = play(
        ToolCallPiece(0, "a", "f", '{"x":'),
        ToolCallPiece(1, "b", "f", '{"y":'),
        Text("between"),
        ToolCallPiece(0, "", "", "1}"),
        ToolCallPiece(1, "", "", "2}"),
        Finish("tool_calls"),
    )
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [(item.get("call_id"), item.get("arguments")) for item in done] == [
        ("a", '{"x":1}'), ("b", '{"y":2}'), (None, None),
    ]  # fmt: skip
    assert events[-1]["response"]["output"] == done


@pytest.mark.parametrize("finish", ["length", "tool_calls"])
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (['{"input": "*** Begin\\n+hel'], "*** Begin\n+hel"),
        ([r'{"input": "\d+', r' \u12 \ud83d \ud83d\ude00"}'], "\\d+ \\u12 � 😀"),
        (['{"input": "echo "hi', '" there"}'], 'echo "hi" there"}'),
        (['{"other": "a"', "}"], '{"other": "a"}'),
        (['{"input": "a", ', '"input": "b"}'], 'a", "input": "b"}'),
    ],
)
def test_the_pieces_of_a_broken_custom_call_are_its_input(pieces: list[str], text: str, finish: str) -> None:
    """Cut short, with an escape that JSON does not know, or malformed. Nothing of it may be lost."""
    calls = [ToolCallPiece(0, "a", "patch", piece) for piece in pieces]
    events = play(*calls, Finish(finish))
    joined = "".join(event["delta"] for event in events if event["type"].endswith("input.delta"))
    [done] = [event["input"] for event in events if event["type"].endswith("input.done")]
    [item] = events[-1]["response"]["output"]
    assert joined == done == item["input"] == text


def test_a_call_without_id_or_arguments_gets_them() -> None:
    [item] = play(ToolCallPiece(0, "", "f", ""))[-1]["response"]["output"]
    assert item["call_id"].startswith("call_")
    assert item["arguments"] == "{}"
