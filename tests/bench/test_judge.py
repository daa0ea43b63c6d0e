"""bench/judge.py passes a complete answer and finds each defect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.judge import judge_stream, judge_whole

Json = dict[str, Any]
CHAT: Json = {"messages": [], "max_tokens": 8}
TEXT: Json = {"prompt": "x", "max_tokens": 8}
WITH_USAGE: Json = {**CHAT, "stream_options": {"include_usage": True}}
HEAD: Json = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def chunk(delta: Json | None = None, finish: str | None = None, **head: Any) -> Json:
    return {**HEAD, "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **head}


ROLE, HELLO, STOP = chunk({"role": "assistant", "content": ""}), chunk({"content": "Hello"}), chunk(finish="stop")
USAGE: Json = {**HEAD, "choices": [], "usage": {"completion_tokens": 2}}
DONE = "[DONE]"


def stream(*events: Any) -> bytes:
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def test_complete_streams_pass() -> None:
    assert judge_stream(200, stream(ROLE, HELLO, STOP, DONE), CHAT) == ""
    assert judge_stream(200, b": ping\n\n" + stream(ROLE, HELLO, STOP, USAGE, DONE), WITH_USAGE) == ""
    text = {"id": "a", "object": "text_completion", "created": 1, "model": "m"}
    choice = {"index": 0, "text": "Hello", "finish_reason": "length"}
    assert judge_stream(200, stream({**text, "choices": [choice]}, DONE), TEXT) == ""


@pytest.mark.parametrize(
    ("events", "wrong"),
    [
        ([ROLE, HELLO, {"error": {"message": "gone"}}], "error event: gone"),
        ([ROLE, HELLO, STOP], "[DONE] came 0 times"),
        ([ROLE, STOP, DONE, DONE], "[DONE] came 2 times"),
        ([ROLE, STOP, DONE, HELLO], "events after [DONE]"),
        ([HELLO, STOP, DONE], "0 role chunks"),
        ([ROLE, HELLO, ROLE, STOP, DONE], "2 role chunks"),
        ([ROLE, HELLO, DONE], "0 finish_reasons"),
        ([ROLE, STOP, STOP, DONE], "2 finish_reasons"),
        ([ROLE, chunk(finish="abort"), DONE], "finish_reason abort"),
        ([ROLE, chunk({"content": "x"}, id="b"), STOP, DONE], "2 different values of id"),
        ([ROLE, chunk({"content": "x"}, created=2), STOP, DONE], "2 different values of created"),
        ([ROLE, chunk({"content": "x"}, model="n"), STOP, DONE], "2 different values of model"),
        ([ROLE, chunk({"content": "<|im_"}), chunk({"content": "end|>"}), STOP, DONE], "<|im_end|> in the text"),
    ],
)
def test_incomplete_streams_are_found(events: list[Any], wrong: str) -> None:
    assert judge_stream(200, stream(*events), CHAT) == wrong


@pytest.mark.parametrize(
    "events",
    [[ROLE, STOP, DONE], [ROLE, USAGE, STOP, DONE], [ROLE, STOP, USAGE, USAGE, DONE]],
    ids=["none", "early", "twice"],
)
def test_requested_usage_comes_once_at_the_end(events: list[Any]) -> None:
    assert "usage" in judge_stream(200, stream(*events), WITH_USAGE)


def test_usage_over_the_limit_is_found() -> None:
    much = {**USAGE, "usage": {"completion_tokens": 9}}
    assert judge_stream(200, stream(ROLE, STOP, much, DONE), WITH_USAGE) == "9 tokens of 8 asked for"


@pytest.mark.parametrize(
    "body", [b"data: {\n\n", b"nonsense\n\n", b"data: 1\n\ndata: [DONE]\n\n", b"data: {}\n\ndata: [DONE]\n\n"]
)
def test_other_lines_are_malformed(body: bytes) -> None:
    assert judge_stream(200, body, CHAT).startswith("malformed")


def test_a_cut_event_is_found() -> None:
    assert judge_stream(200, stream(ROLE, STOP, DONE)[:-1], CHAT) == "the last event is cut"


def whole(finish: str = "stop", content: str = "Hello", tokens: int = 2) -> bytes:
    choice = {"index": 0, "message": {"content": content}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()


def test_non_streaming_answers() -> None:
    assert judge_whole(200, whole(), CHAT) == ""
    assert judge_whole(503, b"busy", CHAT) == "503: busy"
    assert judge_whole(200, whole("abort"), CHAT) == "finish_reason abort"
    assert judge_whole(200, whole(tokens=9), CHAT) == "9 tokens of 8 asked for"
    assert judge_whole(200, b"{", CHAT).startswith("malformed")
    assert judge_whole(200, b'{"error": {}}', CHAT).startswith("malformed")
