"""Events of any server, in any form, cut anywhere; and chunks with values of any type in any place."""

from __future__ import annotations

import random
from typing import Any

import orjson
import pytest

from tests.support.chunks import LLAMA_CPP_PYTHON, LLAMA_SERVER, OPENAI, VLLM, Replica, call, delta, make_request, text
from tests.support.fuzzing import cut, examples, mutated, mutated_json, reported
from xgen_proxy import sse
from xgen_proxy.errors import UpstreamError, UpstreamOversizedError, UpstreamProtocolError
from xgen_proxy.forwarding.continuation.resumed import ResumedStream, Way
from xgen_proxy.forwarding.continuation.sent import parse_sent_prefix

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
LOGPROBS = {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": [{"token": "b", "logprob": -2.0}]}]}
CHATS = [
    delta(role="assistant", content=None), delta(content="a "), delta(content="b", index=1), call('{"a":'), call("1}"),
    delta(reasoning_content="hm"), delta("stop"), {**delta(), "choices": [], "usage": USAGE},
]  # fmt: skip
TEXTS = [text("a", logprobs=LOGPROBS), text("b"), text("", "length"), {**text("", "stop", 1), "usage": USAGE}]
MAX_EVENT = 2000


def written(rng: random.Random, chunk: Any) -> bytes:
    """One event in any form that the specification allows."""
    end = rng.choice((b"\n", b"\n", b"\r\n", b"\r"))
    data = orjson.dumps(chunk, option=rng.choice((0, orjson.OPT_INDENT_2)))
    lines = [b"data:" + rng.choice((b" ", b"")) + line for line in data.split(b"\n")]
    for extra in (b": comment", b"id: 7", b"retry: 5", b"event: message", b"unknown", b"data"):
        if rng.random() < 0.05:
            lines.insert(rng.randrange(len(lines) + 1), extra)
    return b"".join(line + end for line in [*lines, b""])


def stream(rng: random.Random) -> bytes:
    chunks = [rng.choice(CHATS + TEXTS) for _ in range(rng.randrange(5))]
    start = rng.choice((b"", b"", b"\xef\xbb\xbf"))
    return start + b"".join(written(rng, chunk) for chunk in chunks) + rng.choice((b"", sse.DONE, b"data:[DONE]\r\r"))


def normalised(pieces: list[bytes]) -> bytes | None:
    """None if the stream is refused."""
    splitter = sse.EventNormaliser()
    out = b""
    try:
        for piece in pieces:
            out += splitter.feed(piece)
            assert len(splitter.pending) + sum(map(len, splitter._data)) <= 2 * MAX_EVENT
    except (UpstreamProtocolError, UpstreamOversizedError):
        return None
    return out


@pytest.fixture
def small_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", MAX_EVENT)


@pytest.mark.usefixtures("small_events")
def test_any_cut_of_any_stream_gives_the_same_events() -> None:
    for rng in examples():
        data = mutated(rng, stream(rng))
        with reported(data):
            events = normalised([data])
            assert normalised(cut(rng, data)) == events
            if rng.random() < 0.1:
                assert normalised([data[at : at + 1] for at in range(len(data))]) == events
            for event in sse.events(events or b""):
                check_event(event)


def check_event(event: bytes) -> None:
    assert event.endswith(b"\n\n")
    if event.startswith(b":") or event == sse.DONE:
        return
    assert event.count(b"\n") == 2
    if not sse.is_error(event):
        [chunk] = sse.parse_chunks(event)
        finishes = [choice.get("finish_reason") for choice in chunk["choices"]]
        assert sse.count_finished(event) >= sum(map(bool, finishes))
        inner = [{**choice, "finish_reason": None} for choice in chunk["choices"]]
        deeper = sse.is_abort(orjson.dumps({**chunk, "choices": inner}))  # where no engine has one: broken, too
        assert deeper or not sse.is_abort(event)


def test_well_formed_streams_are_read_in_full() -> None:
    for rng in examples():
        chunks = [rng.choice(CHATS + TEXTS) for _ in range(rng.randrange(5))]
        data = b"".join(written(rng, chunk) for chunk in chunks)
        with reported(data):
            events = normalised(cut(rng, data))
            assert events is not None
            read = [chunk for event in sse.events(events) for chunk in sse.parse_chunks(event)]
            assert [chunk["choices"] for chunk in read] == [chunk["choices"] for chunk in chunks]


@pytest.mark.usefixtures("small_events")
def test_any_bytes_of_an_engine_come_out_unchanged() -> None:
    for rng in examples():
        data = mutated(rng, stream(rng))
        with reported(data):
            splitter = sse.EventSplitter()
            try:
                out = b"".join(splitter.feed(piece) for piece in cut(rng, data))
            except UpstreamProtocolError:
                continue
            assert out + bytes(splitter.pending) == data
            assert len(splitter.pending) <= MAX_EVENT


def events_of(rng: random.Random, endpoint: str) -> list[bytes]:
    chunks = [rng.choice(CHATS if endpoint == "chat" else TEXTS) for _ in range(rng.randrange(1, 6))]
    return [sse.encode(mutated_json(rng, chunk) if rng.random() < 0.5 else chunk) for chunk in chunks]


COMMON: list[dict[str, Any]] = [{}, {"stop": ["STOP"]}, {"stream_options": {"include_usage": True}}]
FIELDS = {"chat": [*COMMON, {"logprobs": True}], "completions": [*COMMON, {"logprobs": 1}]}


async def test_an_editor_or_collector_refuses_or_takes_any_chunk() -> None:
    for rng in examples():
        endpoint: Any = rng.choice(("chat", "completions"))
        dialect = rng.choice((VLLM, LLAMA_SERVER, LLAMA_CPP_PYTHON, OPENAI))
        request = make_request(endpoint, alias="public", stream=True, **rng.choice(FIELDS[endpoint]))
        events = events_of(rng, endpoint)
        with reported((dialect.name, endpoint, request.body, events)):
            editor = dialect.stream_editor(request)
            try:
                for event in events:
                    if editor is not None:
                        editor.edit(event)
                if editor is not None:
                    await editor.finish(Replica().post)
            except UpstreamError:
                pass
            collector = dialect.stream_collector(request)
            try:
                for event in events:
                    collector.feed(event)
                await collector.finish(Replica().post)
                collector.encoded()
            except UpstreamError:
                pass


async def test_a_continuation_refuses_or_takes_any_chunk() -> None:
    for rng in examples():
        endpoint: Any = rng.choice(("chat", "completions"))
        request = make_request(endpoint, stream=True, stream_options={"include_usage": True})
        sent, more = events_of(rng, endpoint), events_of(rng, endpoint)
        with reported((endpoint, sent, more)):
            try:
                prefix = parse_sent_prefix(b"".join(sent))
                way: Way = rng.choice(("continue", "relabel", "repeat", "usage"))
                resumed = ResumedStream(prefix, 1, request.features, way)
                resumed.after(LLAMA_SERVER.stream_editor(request))
                resumed.check(b"".join(more))
                for event in more:
                    resumed.edit(event)
                await resumed.finish(Replica().post)
            except UpstreamError:
                pass
