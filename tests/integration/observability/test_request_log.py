"""The log line of each kind of request, and the counters that change with it."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_upstream import FakeUpstream, Talk, delta, status
from tests.support.running_proxy import (
    CHAT,
    RunningProxy,
    backend,
    chat,
    get,
    running_proxy,
    wait_until,
)
from xgen_proxy.observability.logging_setup import JsonFormatter, PlainFormatter

PROMPT = "the-secret-of-this-prompt"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    gpu, cpu = fakes
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")}
    with running_proxy(backends=backends) as running:
        yield running


@pytest.fixture(autouse=True)
def reset_breakers(proxy: RunningProxy) -> None:
    for replica in proxy.gateway.fleet.replicas:
        replica.breaker.failures = 0


Metrics = dict[tuple[str, frozenset[tuple[str, str]]], float]


def page(proxy: RunningProxy) -> Metrics:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(get(f"{proxy.url}/metrics").text)
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket")) and not sample.name.startswith("xgen_replica_")
    }


class Watch:
    """changes() returns the counters that grew since the last call, and by how much."""

    def __init__(self, proxy: RunningProxy) -> None:
        self.proxy = proxy
        self.before = page(proxy)

    def changes(self) -> dict[str, dict[str, str]]:
        now = page(self.proxy)
        grown = {key: value - self.before.get(key, 0) for key, value in now.items() if value != self.before.get(key, 0)}
        self.before = now
        return {name: {**dict(labels), "by": str(by)} for (name, labels), by in grown.items()}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The log lines as an operator gets them."""
    records = [record for record in caplog.records if record.name.startswith("xgen_proxy.request")]
    return [json.loads(JsonFormatter().format(record)) for record in records]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Everything that is logged. Fails if a line has the prompt."""
    caplog.set_level(logging.DEBUG)
    yield caplog
    for record in caplog.records:
        for formatter in (JsonFormatter(), PlainFormatter()):
            assert PROMPT not in formatter.format(record)


@pytest.mark.parametrize("stream", [False, True])
def test_a_served_request(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], log: pytest.LogCaptureFixture, stream: bool
) -> None:
    watch = Watch(proxy)
    answer = chat(proxy, messages=MESSAGES, stream=stream, headers={"x-request-id": "good-1"})
    assert answer.status_code == 200
    wait_until(lambda: lines(log))
    changes = watch.changes()
    duration = changes.pop("xgen_request_duration_seconds_sum")
    first = changes.pop("xgen_time_to_first_token_seconds_sum") if stream else duration
    overhead = changes.pop("xgen_overhead_seconds_sum")
    where = {"endpoint": "chat", "backend": "vllm", "by": "1.0"}
    replica = f"vllm@127.0.0.1:{fakes[0].port}"
    grown: dict[str, Any] = {
        "xgen_requests_total": {**where, "replica": replica, "model": "m", "status": "200", "reason": "default"},
        "xgen_request_duration_seconds_count": where,
        "xgen_overhead_seconds_count": {"by": "1.0"},
    }
    if stream:
        grown["xgen_time_to_first_token_seconds_count"] = where
    for name in ("xgen_inter_chunk_seconds_sum", "xgen_inter_chunk_seconds_count"):
        changes.pop(name, None)  # the fake's events may come in one piece
    if not stream:
        assert changes.pop("xgen_tokens_total") == {"backend": "vllm", "model": "m", "type": "output", "by": "1.0"}
    assert changes == grown
    assert 0 < float(overhead["by"]) <= float(first["by"]) <= float(duration["by"]) < 20
    [line] = lines(log)
    expected: dict[str, Any] = {
        "level": "info", "logger": "xgen_proxy.request", "message": "request", "request_id": "good-1",
        "endpoint": "chat", "model": "m", "status": 200, "attempts": 1, "stream": stream, "prompt_words": 4,
        "backend": "vllm", "replica": replica, "client": "127.0.0.1",
    }  # fmt: skip
    if stream:
        expected["bytes_out"] = len(answer.content.removesuffix(b"data: [DONE]\n\n"))
    else:
        expected |= {"bytes_out": len(answer.content), "tokens_in": 3, "tokens_out": 1}
    assert line.pop("time")
    assert line.pop("reason").startswith("default: GPU load")
    assert 0 <= line.pop("ttft_s") <= line.pop("duration_s") < 20
    assert line == expected


def test_a_failover(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], log: pytest.LogCaptureFixture
) -> None:
    watch = Watch(proxy)
    fakes[0].scripts.append(status(500))
    assert chat(proxy, messages=MESSAGES).status_code == 200
    wait_until(lambda: len(lines(log)) == 2)
    changes = watch.changes()
    failed = changes["xgen_attempt_failures_total"]
    name = f"vllm@127.0.0.1:{fakes[0].port}"
    assert failed == {"backend": "vllm", "replica": name, "outcome": "broken", "by": "1.0"}
    requests = changes["xgen_requests_total"]
    assert isinstance(requests, dict)
    assert (requests["backend"], requests["status"], requests["reason"]) == ("llama_cpp", "200", "fallback")
    attempt, request = lines(log)
    assert (attempt["level"], attempt["outcome"], attempt["replica"]) == ("warning", "broken", name)
    assert attempt["request_id"] == request["request_id"]
    assert request["attempts"] == 2
    assert request["failed"] == [{"replica": name, "outcome": "broken"}]


def test_a_request_whose_targets_all_failed(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], log: pytest.LogCaptureFixture
) -> None:
    watch = Watch(proxy)
    for fake in fakes:
        fake.scripts.append(status(429))
    assert chat(proxy, messages=MESSAGES).status_code == 503
    wait_until(lambda: len(lines(log)) == 3)
    requests = watch.changes()["xgen_requests_total"]
    assert isinstance(requests, dict)
    assert requests["status"] == "503"
    line = lines(log)[-1]
    assert (line["code"], line["attempts"]) == ("all_backends_failed", 2)
    assert [each["outcome"] for each in line["failed"]] == ["busy", "busy"]
    assert "ttft_s" not in line


def test_an_interrupted_stream(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], log: pytest.LogCaptureFixture
) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        talk.reset()

    for fake in fakes:
        fake.scripts += [breaks, breaks]
    assert chat(proxy, messages=MESSAGES, stream=True, headers={"x-fallback": "none"}).status_code == 200
    wait_until(lambda: len(lines(log)) >= 2)
    request = lines(log)[-1]
    assert request["status"] == 200
    assert request["broken"]
    for fake in fakes:
        fake.scripts.clear()


def test_a_backend_that_echoes_the_prompt_in_its_error(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], log: pytest.LogCaptureFixture
) -> None:
    """Validation errors of the engines do."""
    wrong = {"type": "x", "loc": ("body", "messages", 0), "msg": "Input should be another", "input": PROMPT}
    for code in (400, 500):
        body = {"error": {"message": f"1 validation error: [{wrong}]", "type": "t", "code": code}}
        for fake in fakes:
            fake.scripts = [status(code, body)]
        answer = chat(proxy, messages=MESSAGES)
        assert PROMPT not in answer.text
        assert "Input should be another" in answer.text
    wait_until(lambda: len(lines(log)) >= 2)
    for fake in fakes:
        fake.scripts.clear()


def test_a_disconnect(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], log: pytest.LogCaptureFixture
) -> None:
    async def endless(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("hel"))
        await talk.until_client_leaves()

    watch = Watch(proxy)
    fakes[0].scripts.append(endless)
    body = json.dumps({**CHAT, "messages": MESSAGES, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
        client.sendall(body)
        assert client.recv(65536)
    wait_until(lambda: lines(log))
    changes = watch.changes()
    assert changes["xgen_cancellations_total"] == {"stage": "answering", "by": "1.0"}
    requests = changes["xgen_requests_total"]
    assert isinstance(requests, dict)
    assert requests["status"] == "499"
    assert lines(log)[-1]["status"] == 499


def test_labels_do_not_grow_with_what_clients_send(proxy: RunningProxy) -> None:
    def send(number: int) -> None:
        headers = {"x-request-id": f"r-{number}", "x-session-id": f"s-{number}"}
        assert chat(proxy, model=f"none-{number}", headers=headers).status_code == 404
        fields: dict[str, Any] = {"task_type": f"task-{number}", "user": f"user-{number}"}
        assert chat(proxy, headers=headers, **fields).status_code == 200

    send(0)
    before = set(page(proxy))
    assert any(name == "xgen_requests_total" for name, _ in before)
    assert any(name == "xgen_refused_requests_total" for name, _ in before)
    for number in range(1, 5):
        send(number)
    assert set(page(proxy)) == before


def test_a_log_level_above_info_skips_the_line(proxy: RunningProxy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "xgen_proxy.request")
    assert chat(proxy).status_code == 200
    assert lines(caplog) == []


def test_the_backends_message_reaches_the_client_and_not_the_log(
    proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream], caplog: pytest.LogCaptureFixture
) -> None:
    gpu, cpu = fakes
    says = status(500, {"error": {"message": f"cannot read {PROMPT}"}})
    gpu.scripts.append(says)
    cpu.scripts.append(says)
    with caplog.at_level(logging.INFO):
        assert PROMPT in chat(proxy).text
        wait_until(lambda: any(record.getMessage() == "request" for record in caplog.records))
    logged = "".join(str(vars(record)) for record in caplog.records)
    assert "says 500" in logged
    assert PROMPT not in logged
