"""The translating writer, with an API whose words are easy to tell from a chat's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import orjson
import pytest
from starlette.types import Message

from tests.support.chunks import HI, delta, events
from xgen_proxy import sse
from xgen_proxy.errors import (
    BadRequestError,
    ProxyError,
    ServiceUnavailableError,
    UpstreamProtocolError,
)
from xgen_proxy.forwarding.replay_buffer import ReplayBuffer
from xgen_proxy.request.call import Call, Origin, parse_call
from xgen_proxy.request.features import Json
from xgen_proxy.request.limits import Limits
from xgen_proxy.translation.chat import Failure, Piece, Text, read_answer
from xgen_proxy.translation.messages.api import MessagesApi
from xgen_proxy.translation.responses.api import ResponsesApi
from xgen_proxy.translation.translation import Api
from xgen_proxy.translation.writer import TranslatingWriter

HELLO = events(delta(role="assistant", content=""), delta(content="Hel"), delta(content="lo"))
FINISH = events(delta(finish="stop"))


class Words:
    """A stream of words in brackets."""

    def ping(self) -> bytes:
        return b"<ping>"

    def feed(self, piece: Piece) -> bytes:
        if isinstance(piece, Failure):
            return b"<failed: %b>" % piece.error["message"].encode()
        return b"<%b>" % piece.text.encode() if isinstance(piece, Text) else b""

    def end(self) -> bytes:
        return b"<end>"


class Shout:
    """The translation."""

    def __init__(self) -> None:
        self.body: Json = {}
        self.dropped: tuple[str, ...] = ("web_search", "é", "bad\r\nx-evil: 1", *map(str, range(30)))

    def whole(self, data: bytes, call: Call) -> bytes:
        return read_answer(data).text.upper().encode()

    def stream(self, call: Call) -> Words:
        return Words()


class ShoutingApi:
    """The API."""

    def translate(self, body: Json) -> Shout:
        return Shout()

    def error(self, error: ProxyError, request_id: str) -> tuple[int, bytes]:
        return 599, f"{request_id}: {error.message}".encode()

    def fails_in_stream(self, error: ProxyError, originator: bytes) -> bool:
        return error.code == "too_long"


@pytest.fixture
def sent() -> list[Message]:
    return []


async def collect(sent: list[Message], message: Message) -> None:
    sent.append(message)


def writer_for(sent: list[Message], **fields: Any) -> TranslatingWriter:
    body: dict[str, Any] = {"model": "m", "messages": HI, **fields}
    call = parse_call(
        Origin("req-1", {}), "chat", orjson.dumps(body), body, limits=Limits(), continuation=True,
        default_model=lambda: "m",
    )  # fmt: skip
    return TranslatingWriter(partial(collect, sent), None, ShoutingApi(), Shout(), call)


@pytest.fixture
def writer(sent: list[Message]) -> TranslatingWriter:
    return writer_for(sent)


def bodies(sent: list[Message]) -> list[bytes]:
    return [message["body"] for message in sent if message["type"] == "http.response.body"]


async def test_a_stream(writer: TranslatingWriter, sent: list[Message]) -> None:
    writer.sent_log = log = ReplayBuffer()
    await writer.start([(b"x-a", b"1")])
    await writer.send(HELLO)
    await writer.send(FINISH)
    await writer.end(sse.DONE)
    await writer.end(sse.DONE)  # once is enough
    assert bodies(sent) == [b"<Hel><lo>", b"<end>"]
    names = ", ".join(["web_search", *map(str, range(19))])  # no more than 20, and none that no header can have
    assert (b"x-dropped", names.encode()) in sent[0]["headers"]
    assert log.all() == HELLO + FINISH  # what a resumption needs


async def test_a_whole_answer(writer: TranslatingWriter, sent: list[Message]) -> None:
    message = {"role": "assistant", "content": "hi"}
    await writer.whole([], orjson.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))
    assert bodies(sent) == [b"HI"]
    assert (b"content-length", b"2") in sent[0]["headers"]


async def test_an_answer_that_is_none_fails_before_anything_is_sent(
    writer: TranslatingWriter, sent: list[Message]
) -> None:
    with pytest.raises(UpstreamProtocolError):
        await writer.whole([], b"{}")
    assert not sent


TOKEN = {"token": "hi", "logprob": -0.5, "bytes": [104, 105]}
COMPLETE: Json = {
    "choices": [{
        "index": 0,
        "message": {
            "role": "assistant", "content": "hi", "refusal": "no", "reasoning": "hm", "reasoning_content": "hm",
            "tool_calls": [
                {"index": 0, "id": "a", "function": {"name": name, "arguments": arguments}}
                for name, arguments in (("f", "{}"), ("patch", '{"input": ""}'), ("f", {"x": 1}))
            ],
        },
        "finish_reason": "stop", "stop_reason": "END", "logprobs": {"content": [{**TOKEN, "top_logprobs": [TOKEN]}]},
    }],
    "usage": {
        "prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1}, "completion_tokens_details": {"reasoning_tokens": 1},
    },
}  # fmt: skip
DEEP = orjson.loads("[" * 300 + "]" * 300)
VALUES: list[Any] = [None, True, 5, -0.5, "x", "\0", [], ["x"], [None], [[]], {}, {"x": 1}, DEEP, "[" * 2000]


def mutated(answer: Any) -> Iterator[Any]:
    """The answer with each of its fields in turn replaced by each value, and left out."""
    for key in range(len(answer)) if isinstance(answer, list) else answer:
        others = {k: v for k, v in answer.items() if k != key} if isinstance(answer, dict) else {}
        changed = [*VALUES, *(mutated(answer[key]) if isinstance(answer[key], dict | list) else ())]
        if isinstance(answer, dict):
            yield others
            yield from ({**answer, key: value} for value in changed)
        else:
            yield from ([*answer[:key], value, *answer[key + 1 :]] for value in changed)


@pytest.mark.parametrize(
    ("api", "body"),
    [
        (MessagesApi(lambda: True), {"max_tokens": 5, "messages": HI}),
        (ResponsesApi(), {"input": "Hi", "tools": [{"type": "custom", "name": "patch"}]}),
    ],
)
async def test_a_malformed_answer_is_always_the_backends_fault(api: Api, body: Json) -> None:
    sent: list[Message] = []
    call = writer_for(sent)._call
    refused = 0
    for answer in mutated(COMPLETE):
        writer = TranslatingWriter(partial(collect, sent), None, api, api.translate(body), call)
        try:
            await writer.whole([], json.dumps(answer).encode())
        except UpstreamProtocolError:
            refused += 1
    passed = [message["status"] for message in sent if message["type"] == "http.response.start"]
    assert set(passed) == {200}
    assert refused > 100


async def test_an_error_before_the_stream_has_the_apis_own_shape(
    writer: TranslatingWriter, sent: list[Message]
) -> None:
    await writer.fail(ServiceUnavailableError("full"), [])
    assert sent[0]["status"] == 599
    assert bodies(sent) == [b"req-1: full"]


async def test_an_error_in_the_stream_is_its_last_event(writer: TranslatingWriter, sent: list[Message]) -> None:
    await writer.start([])
    await writer.send(HELLO)
    await writer.fail(ServiceUnavailableError("gone"), [])
    await writer.send(HELLO)
    assert bodies(sent) == [b"<Hel><lo>", b"<failed: gone>"]


async def test_what_says_nothing_is_not_sent(writer: TranslatingWriter, sent: list[Message]) -> None:
    """An empty chunk would end the body."""
    await writer.start([])
    await writer.send(events(delta(role="assistant", content="")))
    await writer.comment("resumed on b")
    assert bodies(sent) == [sse.comment("resumed on b")]
    assert writer.pass_through(sse.EventSplitter()) is None


async def test_an_error_that_is_understood_in_a_stream_only(sent: list[Message]) -> None:
    error = BadRequestError("too long", code="too_long")
    await writer_for(sent, stream=True).fail(error, [(b"x-a", b"1")])
    assert sent[0]["status"] == 200
    assert {(b"x-a", b"1"), (b"request-id", b"req-1")} <= {*sent[0]["headers"]}
    assert bodies(sent) == [b"<failed: too long>"]
    sent.clear()
    await writer_for(sent).fail(error, [])
    assert sent[0]["status"] == 599, "this client asked for no stream"


async def test_a_client_is_shown_that_the_stream_is_alive(writer: TranslatingWriter, sent: list[Message]) -> None:
    """By a ping of its API. After the end there is none."""
    await writer.start([])
    await writer.alive()
    await writer.end(sse.DONE)
    await writer.alive()
    assert bodies(sent) == [b"<ping>", b"<end>"]


async def test_events_that_cannot_be_read_are_neither_sent_nor_recorded(
    writer: TranslatingWriter, sent: list[Message]
) -> None:
    writer.sent_log = log = ReplayBuffer()
    await writer.start([])
    with pytest.raises(UpstreamProtocolError):
        await writer.send(HELLO + b'data: {"choices": [null]}\n\n')
    assert (bodies(sent), log.size) == ([], 0)
    await writer.send(HELLO)
    assert bodies(sent) == [b"<Hel><lo>"]
