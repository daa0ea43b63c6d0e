from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.support.chunks import ANSWER, make_request, read, text
from tests.support.fake_upstream import whole
from xgen_proxy.dialects.whole_response import MAX_PARSED, as_events, check_whole
from xgen_proxy.errors import (
    RequestRejectedError,
    UpstreamOverloadedError,
    UpstreamProtocolError,
    UpstreamServerError,
)


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


GOOD = orjson.dumps(whole())
NO_ANSWERS: dict[str, tuple[bytes, type[Exception]]] = {
    "an error": (b'{"error":{"message":"boom","code":500}}', UpstreamServerError),
    "an error of spaced JSON": (b'{ "error" : {"message": "boom"}, "choices": [] }', UpstreamServerError),
    "an error as text": (b'{"error":"boom"}', UpstreamServerError),
    "vLLM's older error": (b'{"object":"error","message":"no","code":400}', RequestRejectedError),
    "busy": (b'{"error":{"message":"full","code":503}}', UpstreamOverloadedError),
    "an empty object": (b"{}", UpstreamProtocolError),
    "choices are null": (b'{"choices":null}', UpstreamProtocolError),
    "half of it": (GOOD[:-9], UpstreamProtocolError),
    "not JSON": (b"{not json", UpstreamProtocolError),
    "an array": (b"[1]", UpstreamProtocolError),
    "null": (b"null", UpstreamProtocolError),
    "nothing": (b"", UpstreamProtocolError),
    "a page": (b"<html></html>", UpstreamProtocolError),
    "UTF-16": (GOOD.decode().encode("utf-16"), UpstreamProtocolError),
}


@pytest.mark.parametrize("parse", [False, True])
@pytest.mark.parametrize(("data", "kind"), NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_a_200_that_is_no_answer(data: bytes, kind: type[Exception], parse: bool) -> None:
    with pytest.raises(kind):
        check_whole(data, "chat", parse=parse)


@pytest.mark.parametrize("parse", [False, True])
def test_a_200_that_is_an_answer(parse: bool) -> None:
    check_whole(GOOD, "chat", parse=parse)
    check_whole(b"\n" + GOOD + b"\r\n", "completions", parse=parse)
    check_whole(b'{"error":null,"choices":[{}]}', "chat", parse=parse)
    check_whole(b'{"data":[]}', "embeddings", parse=parse)
    check_whole(b'{"data":[' + b"1," * MAX_PARSED + b"1]} ", "embeddings", parse=parse)


@pytest.mark.parametrize("data", [b'{"choices":[]}', GOOD[:-1] + b',"x":NaN}', b'{"text":"choices"}', b'{"choices":5}'])
def test_an_unknown_servers_answer_is_parsed(data: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        check_whole(data, "chat", parse=True)
