from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.support.chunks import ANSWER, make_request, read, text
from xgen_proxy.dialects.whole_response import as_events
from xgen_proxy.errors import UpstreamProtocolError


def test_a_chat_becomes_events() -> None:
    request = make_request(stream=True, stream_options={"include_usage": True}, logprobs=True)
    first, closing, last = read(as_events(request, orjson.dumps(ANSWER)))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["choices"][0]["delta"]["tool_calls"][0]["index"] == 0
    assert first["choices"][0]["logprobs"] == {"content": []}
    assert closing["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}]
    assert last["usage"] == ANSWER["usage"]
    assert len(read(as_events(make_request(stream=True), orjson.dumps(ANSWER)))) == 2


def test_a_completion_becomes_one_event() -> None:
    answer = {**text("One two", "length"), "usage": {}}
    [chunk] = read(as_events(make_request("completions", stream=True, echo=True), orjson.dumps(answer)))
    assert chunk["choices"] == answer["choices"]


MALFORMED: list[Any] = [
    [], {}, {**ANSWER, "choices": [None]}, {**ANSWER, "choices": 5}, {**ANSWER, "usage": 5},
    *({**ANSWER, "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
      for message in (None, 5, {"content": 5}, {"tool_calls": 5}, {"tool_calls": [5]})),
]  # fmt: skip


@pytest.mark.parametrize("data", [b"", *map(orjson.dumps, MALFORMED)])
def test_a_malformed_response_raises(data: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        as_events(make_request(stream=True, stream_options={"include_usage": True}), data)
