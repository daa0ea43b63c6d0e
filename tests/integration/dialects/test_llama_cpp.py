"""llama.cpp's servers: collected streams, streams made of whole responses, and their failures."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta, good, status, whole
from tests.support.running_proxy import CHAT, RunningProxy, backend, chat, post

Start = Callable[..., RunningProxy]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def scripted(*events: Any, done: bool = True) -> Script:
    async def script(talk: Talk) -> None:
        assert talk.json["stream"] is True
        await talk.start_stream()
        for event in events:
            await talk.event(event)
        await talk.end(done)

    return script


ERROR = {"error": {"message": "broken inside", "type": "server_error", "code": 500}}
REFUSAL = {"error": {"message": "the request exceeds the available context size", "code": 400, "type": "x"}}

BROKEN: dict[str, Script] = {
    "an error at once": scripted(ERROR),
    "an error in the middle": scripted(delta("hel"), ERROR),
    "no finish_reason": scripted(delta("hel")),
    "no finish_reason, no [DONE]": scripted(delta("hel"), done=False),
    "aborted": scripted(delta("hel"), delta(finish="abort")),
    "nothing": scripted(),
}


@pytest.mark.parametrize("dialect", ["llama-server", "llama-cpp-python"])
@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN.keys())
def test_a_collected_response_fails_over_wherever_its_stream_breaks(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, script: Script, dialect: str
) -> None:
    gpu.scripts.append(script)
    proxy = start(
        backends={"big": backend(gpu, device_class="gpu", dialect=dialect), "small": backend(cpu, device_class="cpu")}
    )
    answer = chat(proxy)
    assert text_of(answer) == "hello"
    assert answer.headers["x-backend"] == "small"


def test_a_collected_response_needs_a_finish_reason_and_no_done(start: Start, cpu: FakeUpstream) -> None:
    cpu.default = scripted(delta("hel"), delta("lo"), delta(finish="stop"), done=False)
    proxy = start(backends={"cpu": backend(cpu, dialect="llama-server")})
    assert text_of(chat(proxy)) == "hello"


@pytest.mark.parametrize("events", [[REFUSAL], [delta("hel"), REFUSAL]], ids=["at once", "late"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_rejection_in_the_stream_is_passed_on(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, events: list[Any], stream: bool
) -> None:
    gpu.default = scripted(*events)
    backends = {
        "big": backend(gpu, device_class="gpu", dialect="llama-server"),
        "small": backend(cpu, device_class="cpu"),
    }
    proxy = start(backends=backends)
    answer = chat(proxy, stream=stream)
    assert '"code":"context_length_exceeded"' in answer.text
    assert "[DONE]" not in answer.text
    assert answer.status_code in ((200, 400) if stream and len(events) > 1 else (400,))
    assert cpu.talks == []
    assert not any(replica.breaker.failures for replica in proxy.gateway.fleet.replicas)


def test_a_rejection_after_the_commit_is_the_last_event(start: Start, cpu: FakeUpstream) -> None:
    seen = threading.Event()

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        assert await asyncio.to_thread(seen.wait, 10)
        await talk.event(REFUSAL)
        await talk.end()

    cpu.default = script
    proxy = start(backends={"small": backend(cpu, dialect="llama-server")})
    text = ""
    body = {**CHAT, "stream": True}
    url = f"{proxy.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=20, verify=False) as answer:
        assert answer.status_code == 200
        for part in answer.iter_text():
            text += part
            seen.set()
    assert '"code":"context_length_exceeded"' in text.split("\n\n")[-2]
    assert "[DONE]" not in text
    [replica] = proxy.gateway.fleet.replicas
    assert replica.breaker.failures == 0


# a stream made of a whole answer


@pytest.mark.parametrize("usage", [False, True])
def test_logprobs_are_asked_for_whole_and_streamed(start: Start, cpu: FakeUpstream, usage: bool) -> None:
    cpu.default = good
    proxy = start(backends={"cpu": backend(cpu, dialect="llama-cpp-python")})
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    answer = chat(proxy, stream=True, logprobs=True, **options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert cpu.talks[0].json["stream"] is False
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"]) == "hello"
    assert [each["usage"]["total_tokens"] for each in chunks if "usage" in each] == [4] * usage


async def no_answer(talk: Talk) -> None:
    await talk.answer(200, b"<html>")


async def half_an_answer(talk: Talk) -> None:
    await talk.answer(200, {"id": "x", "created": 1, "model": "m"})


@pytest.mark.parametrize("script", [no_answer, half_an_answer])
def test_a_malformed_whole_response_fails_over(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, script: Script
) -> None:
    gpu.default = script
    backends = {
        "big": backend(gpu, device_class="gpu", dialect="llama-cpp-python"),
        "small": backend(cpu, device_class="cpu"),
    }
    proxy = start(backends=backends)
    answer = chat(proxy, stream=True, logprobs=True)
    assert (answer.status_code, answer.headers["x-backend"]) == (200, "small")
    assert answer.text.endswith("data: [DONE]\n\n")


# a backend that turns out to be unable


def test_a_fallback_that_cannot_serve_the_request_is_not_blamed(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    gpu.default = status(500)
    backends = {"big": backend(gpu), "small": backend(cpu, dialect="llama-cpp-python")}
    proxy = start(backends=backends)
    small = next(replica for replica in proxy.gateway.fleet.replicas if replica.backend_name == "small")
    body = {"model": "m", "prompt": "x", "max_tokens": 5, "n": 1, "response_format": {"type": "json_object"}}
    for _ in range(2):
        answer = post(f"{proxy.url}/v1/completions", json=body)
        assert answer.status_code == 502
        assert "cannot take over" in answer.json()["error"]["message"]
    assert cpu.talks == []
    assert (small.state, small.breaker.failures) == ("up", 0)


def test_a_first_choice_that_cannot_serve_the_request_says_so(start: Start, cpu: FakeUpstream) -> None:
    proxy = start(backends={"small": backend(cpu, dialect="llama-cpp-python")})
    body = {"model": "m", "prompt": "x", "response_format": {"type": "json_object"}}
    answer = post(f"{proxy.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
    assert cpu.talks == []


# what the answer says of the time it took


def test_waiting_for_a_failing_backend_is_not_overhead(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def silent(talk: Talk) -> None:
        await talk.until_client_leaves()

    gpu.default = silent
    proxy = start(
        backends={"vllm": backend(gpu, first_byte_timeout_s=1), "llama_cpp": backend(cpu, device_class="cpu")}
    )
    answer = chat(proxy, stream=True)
    assert answer.headers["x-attempts"] == "2"
    assert float(answer.headers["x-overhead-ms"]) < 900


def test_the_error_names_the_time_limit(start: Start, gpu: FakeUpstream) -> None:
    async def headers_only(talk: Talk) -> None:
        await talk.start_stream()
        await talk.until_client_leaves()

    gpu.default = headers_only
    proxy = start(backends={"vllm": backend(gpu, first_byte_timeout_s=0.25, first_byte_per_1k_words_s=0)})
    answer = chat(proxy, stream=True)
    assert answer.status_code == 504
    assert "nothing more came within 0.25 s" in answer.json()["error"]["message"]


# small questions to the same replica


async def cannot_count(talk: Talk) -> None:
    if talk.json.get("stream"):
        await scripted(delta("hel"), delta("lo"), delta(finish="stop"))(talk)
    else:
        await talk.answer(200, b"<html>")


def test_a_malformed_count_is_a_failure(start: Start, cpu: FakeUpstream) -> None:
    cpu.default = cannot_count
    proxy = start(backends={"cpu": backend(cpu, dialect="llama-cpp-python")})
    answer = chat(proxy)
    assert answer.status_code == 502
    assert "did not answer with JSON" in answer.text


def test_a_stream_whose_tokens_cannot_be_counted_is_complete(start: Start, cpu: FakeUpstream) -> None:
    """An error at its end would make clients discard the text."""
    cpu.default = cannot_count
    proxy = start(backends={"cpu": backend(cpu, dialect="llama-cpp-python")})
    answer = chat(proxy, stream=True, stream_options={"include_usage": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert ": no usage: " in answer.text
    assert '"usage":{' not in answer.text


def test_counts_come_from_the_serving_replica(start: Start, cpu: FakeUpstream) -> None:
    async def counts(talk: Talk) -> None:
        if talk.json.get("stream"):
            await scripted(delta("hel"), delta("lo"), delta(finish="stop"))(talk)
        else:
            await talk.answer(200, whole("x"))

    cpu.default = counts
    proxy = start(backends={"cpu": backend(cpu, dialect="llama-cpp-python")})
    usage = chat(proxy).json()["usage"]
    assert usage["prompt_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
