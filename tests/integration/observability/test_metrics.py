"""The metrics of each way a request can end. Metrics of the fleet: test_ops.py; log lines: test_request_log.py."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_upstream import FakeUpstream, Talk, delta, status, whole
from tests.support.running_proxy import CHAT, RunningProxy, ask, backend, chat, get, post
from tests.support.waiting import wait_until
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.forwarding.outcome import BLOCKS

Start = Callable[..., RunningProxy]
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def samples(proxy: RunningProxy, name: str) -> dict[tuple[str, ...], float]:
    """Label values, in the order of the labels' names, → value."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(get(f"{proxy.url}/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


def until(proxy: RunningProxy, name: str, expected: dict[tuple[str, ...], float]) -> None:
    """Waits for these values: a request is counted a moment after its response. Zeros are left out."""
    wait_until(lambda: {labels: value for labels, value in samples(proxy, name).items() if value} == expected)


def test_series_that_alerts_query_exist_from_the_start(start: Start, gpu: FakeUpstream) -> None:
    """The first event must be a change of a series, not a new series, which has no rate."""
    proxy = start(backends={"vllm": backend(gpu)})
    assert samples(proxy, "xgen_continuations_total") == {("none", block): 0 for block in BLOCKS}
    assert samples(proxy, "xgen_config_reloads_total") == {("taken",): 0, ("refused",): 0}
    assert samples(proxy, "xgen_admission_rejections_total") == {("queue_full",): 0, ("queue_timeout",): 0}
    assert samples(proxy, "xgen_cancellations_total") == {("queued",): 0, ("waiting",): 0, ("answering",): 0}


# refused requests


REFUSALS: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "no JSON": ("/v1/chat/completions", {"content": b"{"}, ("invalid_request_error", "chat")),
    "no such model": ("/v1/completions", {"json": {"model": "x", "prompt": "a"}}, ("model_not_found", "completions")),
    "too large": ("/v1/chat/completions", {"content": b"x" * 2000}, ("request_too_large", "chat")),
    "unsupported": ("/v1/embeddings", {"json": {"model": "m", "input": "a"}}, ("invalid_request_error", "embeddings")),
    "too long": (
        "/v1/completions", {"json": {"model": "m", "prompt": [1] * 400}}, ("context_length_exceeded", "completions"),
    ),
    "generate": ("/generate", {"json": {}}, ("invalid_request_error", "completions")),
    "not found": ("/v2", {}, ("not_found_error", "other")),
    "wrong method": ("/ready", {}, ("method_not_allowed", "other")),
    "dry run": ("/route", {"content": b"{"}, ("invalid_request_error", "other")),
}  # fmt: skip


@pytest.mark.parametrize(("path", "sent", "counted"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_counted_by_code(
    start: Start, gpu: FakeUpstream, path: str, sent: dict[str, Any], counted: tuple[str, str]
) -> None:
    proxy = start(backends={"vllm": backend(gpu, context=100, embeddings=False)}, limits={"body_bytes": 1500})
    assert post(proxy.url + path, **sent).status_code >= 400
    until(proxy, "xgen_refused_requests_total", {counted: 1})
    assert samples(proxy, "xgen_requests_total") == {}


def test_a_missing_key_is_counted(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash_key("sk-mine")])
    assert chat(proxy).status_code == 401
    assert get(f"{proxy.url}/v1/models").status_code == 401
    until(proxy, "xgen_refused_requests_total", {("invalid_api_key", "chat"): 1, ("invalid_api_key", "other"): 1})


def test_a_request_while_everything_is_down_is_counted(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kill()
    wait_until(lambda: not proxy.gateway.ready)
    assert chat(proxy).status_code == 503
    until(proxy, "xgen_refused_requests_total", {("no_backend_available", "chat"): 1})


def test_input_that_is_not_http_is_counted(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(b"hello\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 400")
    until(proxy, "xgen_refused_requests_total", {("invalid_request_error", "other"): 1})


# failover and resumption


def test_a_retry_on_another_backend_is_a_fallback(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.scripts.append(status(500))
    assert chat(proxy).status_code == 200
    until(proxy, "xgen_fallbacks_total", {("vllm", "llama_cpp"): 1})
    assert samples(proxy, "xgen_retries_total") == {("llama_cpp",): 1}
    replica = f"llama_cpp@127.0.0.1:{cpu.port}"
    assert samples(proxy, "xgen_requests_total") == {("llama_cpp", "chat", "m", "fallback", replica, "200"): 1}


def test_a_retry_on_the_same_backend_is_not_a_fallback(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, cpu)})
    gpu.scripts = [status(500)]
    cpu.scripts = [status(500)]
    assert chat(proxy).status_code == 502
    until(proxy, "xgen_retries_total", {("vllm",): 1})
    assert samples(proxy, "xgen_fallbacks_total") == {}


def test_a_resumed_stream_is_counted(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        talk.reset()

    gpu.scripts.append(breaks)
    assert chat(proxy, stream=True).status_code == 200
    until(proxy, "xgen_continuations_total", {("llama_cpp", "text"): 1})
    assert samples(proxy, "xgen_fallbacks_total") == {("vllm", "llama_cpp"): 1}
    assert samples(proxy, "xgen_retries_total") == {("llama_cpp",): 1}


# disconnects


async def silent(talk: Talk) -> None:
    await talk.until_client_leaves()


def test_disconnects_are_counted_by_stage(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"only": backend(gpu, dialect="openai", slots=1)})
    gpu.scripts.append(silent)
    with ask(proxy):
        wait_until(lambda: gpu.talks)
        with ask(proxy):
            wait_until(lambda: proxy.gateway.admission.queue)
        until(proxy, "xgen_cancellations_total", {("queued",): 1})
        assert samples(proxy, "xgen_queue_wait_seconds_count") == {("normal",): 1}
    until(proxy, "xgen_cancellations_total", {("queued",): 1, ("waiting",): 1})
    replica = f"only@127.0.0.1:{gpu.port}"
    left = {("none", "chat", "m", "none", "none", "499"): 1, ("only", "chat", "m", "only", replica, "499"): 1}
    assert samples(proxy, "xgen_requests_total") == left


# the queue


@pytest.mark.parametrize(
    ("limits", "reason", "waits"),
    [({"queue": 0}, "queue_full", False), ({"queue_timeout_s": 0.05}, "queue_timeout", True)],
)
def test_a_request_without_a_slot_is_counted(
    start: Start, gpu: FakeUpstream, limits: dict[str, Any], reason: str, waits: bool
) -> None:
    gpu.scripts.append(silent)
    proxy = start(backends={"only": backend(gpu, dialect="openai", slots=1)}, limits=limits)
    with ask(proxy):
        wait_until(lambda: gpu.talks)
        assert chat(proxy, urgency="low").status_code == 429
        until(proxy, "xgen_admission_rejections_total", {(reason,): 1})
        assert samples(proxy, "xgen_queue_wait_seconds_count") == ({("low",): 1} if waits else {})
        assert not waits or samples(proxy, "xgen_queue_wait_seconds_sum")["low",] > 0.04  # timers may be early


# tokens and gaps


async def with_usage(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta("hel"))
    await talk.event(delta(finish="stop"))
    if talk.json.get("stream_options"):
        await talk.event({**delta(), "choices": [], "usage": USAGE})
    await talk.end()


@pytest.mark.parametrize("dialect", ["vllm", "llama-server"])
@pytest.mark.parametrize(
    ("fields", "counted"),
    [({"stream": True, "stream_options": {"include_usage": True}}, True), ({"stream": True}, False), ({}, True)],
    ids=["stream with usage", "stream", "whole"],
)
def test_tokens_are_counted_where_reported(
    start: Start, gpu: FakeUpstream, dialect: str, fields: dict[str, Any], counted: bool
) -> None:
    async def answer(talk: Talk) -> None:
        if talk.json.get("stream"):
            await with_usage(talk)
        else:
            await talk.answer(200, {**whole(), "usage": USAGE})

    gpu.default = answer
    proxy = start(backends={"b": backend(gpu, dialect=dialect, models={"public": "m"}, context=2048)})
    assert chat(proxy, model="public", **fields).status_code == 200
    until(proxy, "xgen_request_duration_seconds_count", {("b", "chat"): 1})
    tokens = {("b", "public", "input"): 7, ("b", "public", "output"): 2}
    assert samples(proxy, "xgen_tokens_total") == (tokens if counted else {})


def test_the_mean_gap_of_a_stream(start: Start, gpu: FakeUpstream) -> None:
    go_on = threading.Event()
    words = 5

    async def paced(talk: Talk) -> None:
        await talk.start_stream()
        for _ in range(words):
            await talk.event(delta("hel"))
            await asyncio.to_thread(go_on.wait, 10)
            go_on.clear()
        await talk.event(delta(finish="stop"))
        await talk.end()

    gpu.scripts.append(paced)
    proxy = start(backends={"vllm": backend(gpu)})
    with ask(proxy) as client:
        for _ in range(words):
            assert b"hel" in client.recv(65536)
            go_on.set()
        until(proxy, "xgen_inter_chunk_seconds_count", {("vllm",): 1})
    [gaps] = samples(proxy, "xgen_inter_chunk_seconds_sum").values()
    [first] = samples(proxy, "xgen_time_to_first_token_seconds_sum").values()
    [whole] = samples(proxy, "xgen_request_duration_seconds_sum").values()
    assert gaps * words == pytest.approx(whole - first)


# replicas


def test_metrics_of_a_replica(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, dialect="openai", device_class="cpu")})
    vllm, llama = f"vllm@127.0.0.1:{gpu.port}", f"llama_cpp@127.0.0.1:{cpu.port}"
    [(_, age)] = samples(proxy, "xgen_replica_scrape_age_seconds").items()
    assert 0 <= age < 10
    assert samples(proxy, "xgen_backend_device_class") == {("vllm", "gpu"): 1, ("llama_cpp", "cpu"): 1}
    [build] = samples(proxy, "xgen_build_info").values()
    assert build == 1
    closed = {("closed", 1), ("open", 0), ("half-open", 0)}
    states = samples(proxy, "xgen_replica_breaker_state")
    assert {(state, value) for (_, replica, state), value in states.items() if replica == vllm} == closed
    gpu.default = status(500)
    for _ in range(3):
        assert chat(proxy, headers={"x-fallback": "none"}).status_code == 502
    wait_until(lambda: samples(proxy, "xgen_replica_breaker_state")["vllm", vllm, "open"] == 1)
    assert samples(proxy, "xgen_replica_breaker_state")["vllm", vllm, "closed"] == 0
    assert samples(proxy, "xgen_replica_breaker_state")["llama_cpp", llama, "closed"] == 1


def test_series_of_a_removed_replica_are_dropped(proxy: RunningProxy, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.scripts.append(status(500))
    assert chat(proxy).status_code == 200
    assert chat(proxy).status_code == 200
    wait_until(lambda: len(samples(proxy, "xgen_requests_total")) == 2)
    proxy.gateway.metrics.forget(f"vllm@127.0.0.1:{gpu.port}")
    [left] = samples(proxy, "xgen_requests_total")
    assert f"llama_cpp@127.0.0.1:{cpu.port}" in left
    assert samples(proxy, "xgen_attempt_failures_total") == {}


def test_unknown_model_names_become_no_labels(proxy: RunningProxy) -> None:
    for number in range(3):
        assert chat(proxy, model=f"secret-{number}").status_code == 404
    until(proxy, "xgen_refused_requests_total", {("model_not_found", "chat"): 3})
    assert "secret" not in get(f"{proxy.url}/metrics").text


def test_a_request_that_names_no_model_counts_for_the_default(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    body = {name: value for name, value in CHAT.items() if name != "model"}
    assert post(f"{proxy.url}/v1/chat/completions", json=body).status_code == 200
    wait_until(lambda: samples(proxy, "xgen_requests_total"))
    assert [labels[2] for labels in samples(proxy, "xgen_requests_total")] == ["m"]
