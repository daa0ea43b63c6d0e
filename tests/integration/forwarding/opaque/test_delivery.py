"""Answers that pass unread: whole of any type, and streams of any form."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tests.support.commit_point import seen, until_seen
from tests.support.fake_upstream import FakeUpstream, Script, Talk
from tests.support.forms import FORM, field, file, form
from tests.support.running_proxy import RunningProxy, backend, get, post, wait_until

Start = Callable[..., RunningProxy]
RAW = form(field("model", b"public"), file(), field("stream", b"true"))
DELTA = 'event: transcript.text.delta\ndata: {"type":"transcript.text.delta","delta":"hel","model":"m"}'


@pytest.fixture
def pair(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> RunningProxy:
    names = {"public": "m"}
    return start(
        backends={"vllm": backend(gpu, models=names), "other": backend(cpu, device_class="cpu", models=names)},
        sse_keepalive_s=0.05,
    )


def transcribe(proxy: RunningProxy) -> httpx.Response:
    return post(f"{proxy.url}/v1/audio/transcriptions", content=RAW, headers={"content-type": FORM})


def answer(body: bytes, content_type: str = "application/json") -> Script:
    async def script(talk: Talk) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        await talk.send(head.encode() + body)

    return script


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "text/plain; charset=utf-8"),
        (b"WEBVTT\n", "text/vtt"),
        (b"", "text/plain"),
        (b'{"text":"{\\"error\\":{}}"}', "application/json"),
    ],
)
def test_a_whole_answer_keeps_its_bytes_and_type(
    pair: RunningProxy, gpu: FakeUpstream, body: bytes, content_type: str
) -> None:
    gpu.default = answer(body, content_type)
    found = transcribe(pair)
    assert (found.status_code, found.content, found.headers["content-type"]) == (200, body, content_type)
    assert found.headers["x-backend"] == "vllm"


@pytest.mark.parametrize("body", [b'{"error":{"message":"overloaded","code":503}}', b'{"error": "no"}'])
def test_an_error_with_status_200_leads_to_the_next_candidate(
    pair: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream, body: bytes
) -> None:
    gpu.default, cpu.default = answer(body), answer(b'{"text":"hello"}')
    found = transcribe(pair)
    assert (found.json(), found.headers["x-backend"]) == ({"text": "hello"}, "other")


def test_half_an_answer_leads_to_the_next_candidate(pair: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def half(talk: Talk) -> None:
        await talk.send(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"te')
        talk.reset()

    gpu.default, cpu.default = half, answer(b'{"text":"hello"}')
    assert transcribe(pair).headers["x-backend"] == "other"


def test_a_stream_passes_as_it_comes(pair: RunningProxy, gpu: FakeUpstream) -> None:
    async def stream(talk: Talk) -> None:
        await talk.start_stream()
        await talk.chunk(f"{DELTA}\n\nevent: tran".encode())
        await talk.chunk(b'script.text.done\ndata: {"type":"transcript.text.done","text":"hel"}\n\n')
        await talk.end(done=False)

    gpu.default = stream
    found = transcribe(pair)
    assert found.headers["content-type"].startswith("text/event-stream")
    done = 'event: transcript.text.done\ndata: {"type":"transcript.text.done","text":"hel"}\n\n'
    assert found.text == DELTA.replace('"m"', '"public"') + "\n\n" + done
    assert "[DONE]" not in found.text, "OpenAI sends none there"
    assert found.headers["x-replica"].startswith("vllm@")


def test_a_stream_that_begins_with_an_error_leads_to_the_next_candidate(
    pair: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    async def full(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event({"error": {"message": "full", "code": 503}})
        await talk.end()

    gpu.default, cpu.default = full, answer(b'{"text":"hello"}')
    found = transcribe(pair)
    assert (found.json(), found.headers["x-backend"]) == ({"text": "hello"}, "other")


@pytest.mark.parametrize("how", ["reset", "error", "abort", "end in an event"])
def test_a_stream_that_breaks_ends_with_an_error_event(
    pair: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream, how: str
) -> None:
    async def broken(talk: Talk) -> None:
        await talk.start_stream()
        await talk.chunk(f"{DELTA}\n\n".encode())
        await until_seen()
        if how == "error":
            await talk.event({"error": {"message": "engine died", "code": 500}})
            await talk.end()
        elif how == "abort":  # as vLLM's streams end that it cuts
            await talk.event({"model": "m", "choices": [{"delta": {"content": ""}, "finish_reason": "abort"}]})
            await talk.end()
        elif how == "reset":
            talk.reset()
        else:
            await talk.chunk(b'data: {"type":"tran')
            talk.reset()

    gpu.default = broken
    seen.clear()
    text = ""
    url = f"{pair.url}/v1/audio/transcriptions"
    with httpx.stream("POST", url, content=RAW, headers={"content-type": FORM}, timeout=20, verify=False) as found:
        for part in found.iter_text():
            text += part
            seen.set()
    assert text.startswith(DELTA.replace('"m"', '"public"'))
    assert '"code":"stream_broken"' in text
    assert "an answer with transcriptions cannot be resumed" in text
    assert cpu.talks == []
    failures = [line for line in get(f"{pair.url}/metrics").text.splitlines() if "attempt_failures_total{" in line]
    assert [line.rpartition(" ")[2] for line in failures] == ["1.0"]


def test_a_client_that_leaves_a_stream_cancels_it(pair: RunningProxy, gpu: FakeUpstream) -> None:
    left: list[bool] = []

    async def endless(talk: Talk) -> None:
        await talk.start_stream()
        await talk.chunk(f"{DELTA}\n\n".encode())
        await talk.until_client_leaves()
        left.append(True)

    gpu.default = endless
    url = f"{pair.url}/v1/audio/transcriptions"
    with httpx.stream("POST", url, content=RAW, headers={"content-type": FORM}, timeout=20, verify=False) as found:
        assert next(found.iter_text()).startswith("event:")
    wait_until(lambda: left)
    wait_until(lambda: not any(replica.in_flight for replica in pair.gateway.fleet.replicas))
