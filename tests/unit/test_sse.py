from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy import sse
from xgen_proxy.errors import UpstreamOversizedError, UpstreamProtocolError

LF = b'data: {"a":"x\\n\\ny"}\n\nevent: ping\ndata: {}\n\n: comment\n\ndata: [DONE]\n\n'
CRLF = LF.replace(b"\n", b"\r\n")


def fed(parts: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = sse.EventSplitter()
    return [splitter.feed(part) for part in parts], bytes(splitter.pending)


@pytest.mark.parametrize("stream", [LF, CRLF], ids=["LF", "CRLF"])
def test_stream_cut_at_any_byte(stream: bytes) -> None:
    for at in range(len(stream) + 1):
        blocks, rest = fed([stream[:at], stream[at:]])
        assert b"".join(blocks) == stream
        assert rest == b""
        for block in blocks:
            assert block == b"" or block.endswith((b"\n\n", b"\r\n\r\n"))


@pytest.mark.parametrize("stream", [LF, CRLF], ids=["LF", "CRLF"])
def test_each_event_is_returned_once_complete(stream: bytes) -> None:
    blocks, rest = fed([bytes([byte]) for byte in stream])
    assert [block for block in blocks if block] == list(sse.events(stream))
    assert rest == b""


@given(st.lists(st.text(max_size=20), max_size=6), st.booleans(), st.data())
def test_any_stream_with_any_cuts(texts: list[str], crlf: bool, data: st.DataObject) -> None:
    end = b"\r\n\r\n" if crlf else b"\n\n"
    events = [b"data: " + json.dumps({"t": text}, ensure_ascii=False).encode() + end for text in texts]
    stream = b"".join(events) + b"data: unfinished"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    bounds = [0, *cuts, len(stream)]
    blocks, rest = fed([stream[a:b] for a, b in itertools.pairwise(bounds)])
    assert [event for block in blocks for event in sse.events(block)] == events
    assert rest == b"data: unfinished"


def test_read_that_ends_with_an_event_is_not_copied() -> None:
    splitter = sse.EventSplitter()
    assert splitter.feed(LF) is LF


def test_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 100)
    splitter = sse.EventSplitter()
    assert splitter.feed(b"data: " + b"1" * 94) == b""
    with pytest.raises(UpstreamOversizedError, match="more than 100 bytes"):
        splitter.feed(b"2")


def test_long_block_of_complete_events_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 100)
    block = b"data: 1\n\n" * 50
    assert sse.EventSplitter().feed(block) == block


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (b'data: {"error":{"message":"m"}}\n\n', True),
        (b'data: {"error": {"message":"m"}}\n\n', True),
        (b'error: {"code":500}\n\n', True),
        (b'data: {"id":"1"}\n\ndata: {"error":{}}\n\n', True),
        (b'data: {"text":"data: {\\"error\\": 1}"}\n\n', False),
        (b'data: {"text":"\\nerror: x"}\n\n', False),
        (b'data: {"id":"1","error":null}\n\n', False),
    ],
)
def test_error_is_found_only_as_a_line_of_its_own(block: bytes, found: bool) -> None:
    assert sse.is_error(block) is found


def test_finished_choices_are_counted_and_text_is_not() -> None:
    chunk = {"choices": [{"text": '"finish_reason":"stop"', "finish_reason": None}]}
    for separators in ((",", ":"), (", ", ": ")):
        assert sse.count_finished(json.dumps(chunk, separators=separators).encode()) == 0
        chunk["choices"] = [{"finish_reason": "stop"}, {"finish_reason": "length"}]
        assert sse.count_finished(json.dumps(chunk, separators=separators).encode()) == 2
        chunk["choices"] = [{"text": '"finish_reason":"stop"', "finish_reason": None}]


@pytest.mark.parametrize(
    ("block", "before", "done"),
    [
        (b"data: [DONE]\n\n", b"", True),
        (b"data: 1\n\n", b"data: 1\n\n", False),
        (b"data: 1\n\ndata: [DONE]\n\n", b"data: 1\n\n", True),
        (b"data: 1\r\n\r\ndata: [DONE]\r\n\r\n", b"data: 1\r\n\r\n", True),
        (b'data: "data: [DONE]"\n\n', b'data: "data: [DONE]"\n\n', False),
        (b"", b"", False),
    ],
)
def test_split_done(block: bytes, before: bytes, done: bool) -> None:
    assert sse.split_done(block) == (before, done)


def test_payloads() -> None:
    block = b': hello\n\ndata:1\n\nevent: x\nid: 7\ndata: {"a": 2}\n\ndata: [DONE]\r\n\r\n'
    assert list(sse.payloads(block)) == [b"1", b'{"a": 2}', b"[DONE]"]


CHUNK = b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (CHUNK, True),
        (CHUNK * 3, True),
        (CHUNK[:-1], False),
        (CHUNK.replace(b"null", b'"stop"'), False),
        (CHUNK + CHUNK.replace(b"null", b'"stop"'), False),
        (CHUNK + b"data: [DONE]\n\n", False),
        (CHUNK + b'data: {"choices":[],"usage":{}}\n\n', False),
        (CHUNK + b'data: {"error":{}}\n\n', False),
        (CHUNK.replace(b"x", b'\\"finish_reason\\":null'), True),
        (CHUNK.replace(b"x", b"\\n\\ndata: x"), True),
        (CHUNK.replace(b"x", b"\\n\\ndata: x") * 2, True),
        (CHUNK + b"error: {}\n\n", False),
        (b"error: {}\n" + CHUNK, False),
        (CHUNK[:-1] + b"error: {}\n\n", False),
    ],
)
def test_unfinished_chunks(block: bytes, found: bool) -> None:
    assert bool(sse.are_unfinished_chunks(block)) is found


@pytest.mark.parametrize(
    ("delta", "found"),
    [
        (b'{"role":"assistant"}', True),
        (b'{"role": "assistant", "content": ""}', True),
        (b'{"role":"assistant","content":null}', True),
        (b'{"role":"assistant","content":"x"}', False),
        (b'{"content":"x"}', False),
    ],
)
def test_role_only(delta: bytes, found: bool) -> None:
    chunk = b'data: {"choices":[{"delta":%b,"finish_reason":null}]}\n\n' % delta
    assert sse.is_role_only(chunk) is found
    assert not sse.is_role_only(chunk + chunk)
    assert not sse.is_role_only(chunk.replace(b"null}]", b'"stop"}]'))


def test_abort() -> None:
    assert sse.is_abort(b'{"finish_reason":"abort"}')
    assert not sse.is_abort(b'{"text":"\\"finish_reason\\":\\"abort\\""}')


NAME = b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":5}}]}}]}\n\n'


@pytest.mark.parametrize("block", [b"data: {\n\n", b"data: 5\n\n", b'data: {"a": 1}\n\n', NAME])
def test_malformed_chunks_raise(block: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        list(sse.parse_chunks(block))


def test_parse_chunks_reads_what_encode_writes() -> None:
    chunks = [{"choices": [], "a": "x\ny"}, {"choices": [{"index": 1}]}]
    block = b": comment\n\ndata: null\n\n" + b"".join(map(sse.encode, chunks)) + sse.DONE
    assert list(sse.parse_chunks(block)) == chunks


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b'data:{"choices":[]}\n\n', b'data: {"choices":[]}\n\n'),
        (b'\xef\xbb\xbfdata: {"choices":\rdata: []}\r\r', b'data: {"choices":[]}\n\n'),
        (b'event: message\r\nid: 5\r\ndata: {"choices":[]}\r\n\r\n', b'data: {"choices":[]}\n\n'),
        (b"data\n\ndata:\n\nevent: x\n\n", b""),
        (b":OPENROUTER\n\n", b": OPENROUTER\n\n"),
        (b"data:[DONE]\n\ndata: {}\n\n", sse.DONE),
        (b'event: ping\ndata: {"type":"ping"}\n\n', b""),
        (b'data: {"usage":{"prompt_tokens":1}}\n\n', b'data: {"usage":{"prompt_tokens":1},"choices":[]}\n\n'),
        (b'data: {"id":1,"choices":[],"error":{"code":5}}\n\n', b'data: {"error":{"code":5}}\n\n'),
        (b"event: error\ndata: busy\n\n", b'data: {"error":{"message":"busy"}}\n\n'),
        (b'error: {"code":503}\n\n', b'data: {"error":{"code":503}}\n\n'),
    ],
)
def test_events_of_any_server_are_normalised(stream: bytes, events: bytes) -> None:
    assert sse.EventNormaliser().feed(stream) == events
    splitter = sse.EventNormaliser()
    assert b"".join(splitter.feed(bytes([byte])) for byte in stream) == events


@pytest.mark.parametrize("line", [b"data: 1\n", b": comment", b"x" * 30], ids=["lines", "comment", "line"])
def test_an_endless_event_of_any_server_is_refused(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 1000)
    splitter = sse.EventNormaliser()
    with pytest.raises(UpstreamOversizedError, match="more than 1000 bytes"):
        b"".join(splitter.feed(line) for _ in range(1000))


def test_reasoning_gets_one_name() -> None:
    assert sse.one_reasoning_name(b'{"reasoning_content":"a"}') == b'{"reasoning":"a"}'
    for untouched in (
        b'{"reasoning":"a"}',
        b'{"reasoning":"a","reasoning_content":"a"}',
        b'{"content":"\\"reasoning"}',
    ):
        assert sse.one_reasoning_name(untouched) == untouched


def test_an_empty_finish_reason_is_none() -> None:
    events = sse.EventNormaliser().feed(
        b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":""}]}\n\n'
    )
    assert sse.count_finished(events) == 0


@pytest.mark.parametrize("line", [b"\n", b"\r", b":\n", b"x\n"])
def test_lines_of_one_read_have_a_limit(line: bytes) -> None:
    with pytest.raises(UpstreamProtocolError, match="lines in"):
        sse.EventNormaliser().feed(line * (sse.MAX_LINES + 1))


def test_an_event_with_a_name() -> None:
    assert sse.named_event("ping", b'{"a":1}') == b'event: ping\ndata: {"a":1}\n\n'
