"""The states of a replica: starting, up, suspect, down, and up again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.support.fake_upstream import METRICS, FakeUpstream, Script, Talk, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, get
from tests.support.server_process import Streaming
from tests.support.waiting import wait_until
from xgen_proxy.errors import UpstreamLocalError
from xgen_proxy.fleet import circuit_breaker, health
from xgen_proxy.fleet import replica as replica_module
from xgen_proxy.fleet.canary import ask_canary
from xgen_proxy.fleet.load import parse_metrics
from xgen_proxy.fleet.replica import Replica, State
from xgen_proxy.upstream import pool

Start = Callable[..., RunningProxy]


class Upstream(FakeUpstream):
    """Answers to health checks can be scripted by path; other paths get the usual answer."""

    def __post_init__(self) -> None:
        self.check_scripts: dict[str, Script] = {}
        self.checks: list[Talk] = []
        super().__post_init__()

    async def answer_check(self, talk: Talk) -> None:
        self.checks.append(talk)
        script = self.check_scripts.get(talk.path)
        await (script(talk) if script else super().answer_check(talk))


@pytest.fixture
def gpu() -> Iterator[Upstream]:
    fake = Upstream()
    yield fake
    fake.close()


def only(proxy: RunningProxy) -> Replica:
    [replica] = proxy.gateway.fleet.replicas
    return replica


def wait_for_checks(fake: Upstream, count: int) -> None:
    before = len(fake.checks)
    wait_until(lambda: len(fake.checks) >= before + count)


async def hang(talk: Talk) -> None:
    await talk.until_client_leaves()


async def breaks(talk: Talk) -> None:
    talk.reset()


def test_replica_that_starts_after_the_proxy_comes_up(start: Start, gpu: Upstream) -> None:
    gpu.kill()
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    wait_until(lambda: only(proxy).state == "down")
    assert only(proxy).reason
    gpu.start()
    proxy.until_up(1)
    assert (only(proxy).state, only(proxy).reason) == ("up", "healthy")
    assert chat(proxy).status_code == 200


def test_proxy_serves_only_after_the_initial_checks(start: Start, gpu: Upstream) -> None:
    """Otherwise a new proxy rejects, for a moment, what its neighbour can serve."""

    async def slowly(talk: Talk) -> None:
        await asyncio.sleep(0.5)
        await FakeUpstream.answer_check(gpu, talk)

    gpu.check_scripts["/metrics"] = slowly
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    assert chat(proxy).status_code == 200


def test_hanging_replica_does_not_delay_the_start(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "INITIAL_CHECKS_S", 0.2)
    gpu.check_scripts["/metrics"] = hang
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    assert only(proxy).state == "starting"


def test_replica_info_is_read_when_it_comes_up(start: Start, gpu: Upstream) -> None:
    gpu.models = ["a", "b"]
    proxy = start(backends={"vllm": backend(gpu)})
    [vllm] = proxy.gateway.fleet.backends
    assert (set(vllm.models), vllm.context) == ({"a", "b"}, 2048)
    assert only(proxy).in_flight == 0


def test_restarted_replica_may_serve_another_model(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kill()
    wait_until(lambda: only(proxy).state == "down")
    gpu.models = ["new"]
    gpu.start()
    wait_until(lambda: proxy.gateway.fleet.models == ["new"])


def models(*names: str, **card: Any) -> Script:
    return status(200, {"data": [{"id": name, **card} for name in names]})


async def drips(talk: Talk) -> None:
    """A byte at a time, for ever: no single read waits long."""
    await talk.start_stream()
    with contextlib.suppress(OSError):
        while True:
            await talk.chunk(b"#")
            await asyncio.sleep(0.02)


async def drips_headers(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\n")
    with contextlib.suppress(OSError):
        for number in itertools.count():
            await talk.send(b"x-%d: 1\r\n" % number)
            await asyncio.sleep(0.02)


async def floods(talk: Talk) -> None:
    await talk.start_stream()
    with contextlib.suppress(OSError):
        while True:
            await talk.chunk(b"# flood\n" * 8192)


async def says_too_much_at_once(talk: Talk) -> None:
    with contextlib.suppress(OSError):
        await talk.answer(200, b"x" * (replica_module.ANSWER_BYTES + 1))


SICK: dict[str, Script] = {
    "500": status(500),
    "503, still loading": status(503),
    "silence": hang,
    "a body that drips": drips,
    "headers that drip": drips_headers,
    "a flood": floods,
    "too large a page": says_too_much_at_once,
}


@pytest.mark.parametrize("path", ["/metrics", "/v1/models"])
@pytest.mark.parametrize("script", SICK.values(), ids=SICK.keys())
def test_replica_that_gives_no_answer_does_not_come_up(start: Start, gpu: Upstream, script: Script, path: str) -> None:
    gpu.check_scripts[path] = script
    proxy = start(up=0, backends={"vllm": backend(gpu)}, scrape_timeout_s=0.3)
    wait_until(lambda: only(proxy).reason != "not checked yet")
    assert only(proxy).state == ("down" if path == "/metrics" else "starting")
    assert get(f"{proxy.url}/ready").status_code == 503
    gpu.check_scripts.clear()
    proxy.until_up(1)


@pytest.mark.parametrize("script", SICK.values(), ids=SICK.keys())
def test_sick_replica_is_found_down(
    start: Start, gpu: Upstream, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_timeout_s=0.3)
    before = psutil.Process().memory_info().rss
    gpu.check_scripts["/metrics"] = script
    wait_until(lambda: only(proxy).state == "down")
    assert psutil.Process().memory_info().rss - before < 64 * 1024 * 1024
    wait_until(lambda: "is down: 3 health checks in a row failed" in caplog.text)  # told after the state has changed
    gpu.check_scripts.clear()
    proxy.until_up(1)


@pytest.mark.parametrize("status_code", [401, 403])
def test_refused_api_key_keeps_a_replica_from_coming_up(start: Start, gpu: Upstream, status_code: int) -> None:
    gpu.check_scripts["/v1/models"] = status(status_code)
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    wait_until(lambda: "set the backend's api_key" in only(proxy).reason)
    assert (only(proxy).state, only(proxy).answers) == ("starting", True)
    wait_until(lambda: only(proxy).in_flight == 0)  # reading replica info holds a slot for a moment


BOMB = gzip.compress(bytes(150 * 1024 * 1024))
ALIVE: dict[str, Script] = {
    "400": status(400),
    "401": status(401),
    "403": status(403),
    "404": status(404),
    "404, HTML": status(404, b"<html>"),
    "405": status(405),
    "501, as llama-server without --metrics": status(501),
    "302": status(302, headers="location: http://elsewhere.test\r\n"),
    "HTML": status(200, b"<html>"),
    "empty": status(200, b"\n"),
    "JSON": status(200, {"status": "ok"}),
    "no gauges": status(200, b"# HELP other\nother_metric 1\n"),
    "a gauge without a value": status(200, b"vllm:num_requests_running"),
    "a gauge that is no number": status(200, b"vllm:num_requests_running x\n"),
    "NaN": status(200, b"vllm:num_requests_running NaN\nvllm:num_requests_waiting +Inf\n"),
    "no UTF-8": status(200, b"\xff\xfe\x00"),
    "a gzip bomb": status(200, BOMB, headers="content-encoding: gzip\r\n"),
}


@pytest.mark.parametrize("dialect", ["vllm", "llama-server", "llama-cpp-python", "openai"])
@pytest.mark.parametrize("script", ALIVE.values(), ids=ALIVE.keys())
def test_any_answer_is_a_sign_of_life(start: Start, gpu: Upstream, script: Script, dialect: str) -> None:
    """Whatever the page is, the replica is up and its load is unknown."""
    for path in ("/metrics", "/health"):
        gpu.check_scripts[path] = script
    before = psutil.Process().memory_info().rss
    proxy = start(backends={"b": backend(gpu, dialect=dialect)})
    wait_for_checks(gpu, 4)
    assert (only(proxy).state, only(proxy).scraped, only(proxy).load) == ("up", None, 0)
    assert chat(proxy, stream=True).status_code == 200
    assert psutil.Process().memory_info().rss - before < 32 * 1024 * 1024


NO_INFO: dict[str, Script] = {
    "404": status(404),
    "501": status(501),
    "HTML": status(200, b"<html>"),
    "not objects": status(200, ["a"]),
    "no names": status(200, {"data": ["a"]}),
    "no list": status(200, {"data": 5}),
    "null": status(200, b"null"),
    "an odd context": models("m", max_model_len={"a": 1}, meta=7),
    "too many values": status(200, b"[" + b"[]," * 300_000 + b"[]]"),
    "too deep": status(200, b"[" * 100_000 + b"]" * 100_000),
}


@pytest.mark.parametrize("dialect", ["vllm", "llama-server", "llama-cpp-python", "openai"])
@pytest.mark.parametrize("script", NO_INFO.values(), ids=NO_INFO.keys())
def test_what_a_replica_serves_is_learnt_apart_from_whether_it_lives(
    start: Start, gpu: Upstream, script: Script, dialect: str
) -> None:
    """With the model in the settings it serves without saying so."""
    gpu.check_scripts |= {"/v1/models": script, "/props": script}
    proxy = start(backends={"b": backend(gpu, dialect=dialect, models={"m": "m"})})
    assert chat(proxy, stream=True).status_code == 200


def test_llama_server_without_metrics(start: Start, gpu: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    gpu.check_scripts["/metrics"] = status(501, {"error": {"code": 501, "message": "", "type": "not_supported_error"}})
    proxy = start(backends={"cpu": backend(gpu, dialect="llama-server", slots=4)})
    streaming = Streaming(gpu)
    streaming.start(proxy.url)
    wait_until(lambda: "/metrics" in [talk.path for talk in gpu.checks])
    wait_for_checks(gpu, 4)
    assert (only(proxy).state, only(proxy).load) == ("up", 0.25), "our own requests are its load"
    assert caplog.text.count("reports no load (/metrics: 501)") == 1
    streaming.release.set()
    streaming.thread.join(20)


def test_idle_llama_server_is_left_to_sleep(start: Start, gpu: Upstream) -> None:
    """GET /metrics woke it, in builds before August 2026: https://github.com/ggml-org/llama.cpp/pull/27376"""
    gpu.running = 2
    proxy = start(backends={"cpu": backend(gpu, dialect="llama-server", slots=4)})
    wait_for_checks(gpu, 10)
    assert {talk.path for talk in gpu.checks} == {"/health", "/v1/models", "/props"}
    streaming = Streaming(gpu)
    streaming.start(proxy.url)
    wait_until(lambda: only(proxy).scraped is not None)
    streaming.release.set()
    streaming.thread.join(20)
    wait_until(lambda: only(proxy).in_flight == 0 and only(proxy).scraped is None)
    asked = len(gpu.checks)
    wait_for_checks(gpu, 5)
    assert "/metrics" not in {talk.path for talk in gpu.checks[asked + 1 :]}


# models that come and go


def test_another_model_under_the_same_address_is_asked_what_it_can(start: Start, gpu: Upstream) -> None:
    """As behind a Kubernetes Service in a rolling update: no check fails."""
    gpu.sees = False
    proxy = start(backends={"vllm": backend(gpu)})
    [vllm] = proxy.gateway.fleet.backends
    assert "images" not in vllm.capabilities
    gpu.sees, gpu.models = True, ["vision"]
    wait_until(lambda: vllm.models == {"vision"})
    assert "images" in vllm.capabilities
    gpu.sees, gpu.models = False, ["text"]
    wait_until(lambda: vllm.models == {"text"})
    assert "images" not in vllm.capabilities


def test_models_are_read_again(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.models = ["m", "lora"]
    wait_until(lambda: proxy.gateway.fleet.models == ["lora", "m"])
    gpu.models = ["m"]
    wait_until(lambda: proxy.gateway.fleet.models == ["m"])
    gpu.check_scripts["/v1/models"] = status(500)
    wait_for_checks(gpu, 12)
    assert (proxy.gateway.fleet.models, only(proxy).state) == (["m"], "up"), "what was known is kept"


def test_unknown_model_is_looked_for_before_it_is_refused(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CHECKS_PER_INFO", 10**9)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.models = ["m", "lora"]
    assert chat(proxy, model="lora").status_code == 200
    asked = len([talk for talk in gpu.checks if talk.path == "/v1/models"])
    for number in range(20):
        assert chat(proxy, model=f"unknown-{number}").status_code == 404
    assert len([talk for talk in gpu.checks if talk.path == "/v1/models"]) <= asked + 2, "not once for each request"
    monkeypatch.setattr(health, "UNKNOWN_MODEL_INTERVAL_S", 0.0)
    monkeypatch.setattr(health, "UNKNOWN_MODEL_WAIT_S", 0.1)
    gpu.check_scripts["/v1/models"] = hang
    before = time.monotonic()
    assert chat(proxy, model="unknown").status_code == 404
    assert time.monotonic() - before < 1.5, "it waits for a moment only"


def test_models_of_llama_cpp_python_are_read_once(start: Start, gpu: Upstream) -> None:
    """Its /v1/models waits for the lock that a generation holds."""
    start(backends={"cpu": backend(gpu, dialect="llama-cpp-python")})
    wait_for_checks(gpu, 12)
    assert [talk.path for talk in gpu.checks].count("/v1/models") == 1


# slots


def test_slots_of_vllm_are_learnt(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    assert only(proxy).slots == 256
    gpu.running, gpu.waiting = 16, 40
    wait_until(lambda: only(proxy).slots == 16)
    assert only(proxy).capacity == 32
    gpu.kill()
    wait_until(lambda: only(proxy).state == "down")
    assert only(proxy).slots == 16
    gpu.running = gpu.waiting = 0
    gpu.start()
    wait_until(lambda: only(proxy).up)
    assert only(proxy).slots == 256, "it may have been started with other flags"


def test_health_checks_send_the_api_key(start: Start, gpu: Upstream) -> None:
    start(backends={"vllm": backend(gpu, api_key="hush")})
    assert {talk.headers.get("authorization") for talk in gpu.checks} == {"Bearer hush"}


def test_two_missed_health_checks_are_ignored(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_timeout_s=0.5)
    misses = iter([status(500), status(502)])

    async def missing_twice(talk: Talk) -> None:
        script = next(misses, None)
        await (script(talk) if script else FakeUpstream.answer_check(gpu, talk))

    states: list[str] = []
    set_state = only(proxy).set_state

    def recording(state: State, reason: str) -> bool:
        states.append(state)
        return set_state(state, reason)

    monkeypatch.setattr(only(proxy), "set_state", recording)
    gpu.check_scripts["/metrics"] = missing_twice
    wait_for_checks(gpu, 5)
    assert (states, only(proxy).state) == ([], "up")


def test_refused_connection_marks_it_down_at_once(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_interval_s=3600)
    gpu.kill()
    assert chat(proxy).status_code == 503
    assert only(proxy).state == "down"
    assert only(proxy).scraped is None


def test_load_is_scraped(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, slots=10)})
    assert only(proxy).load == 0
    gpu.running, gpu.waiting, gpu.kv = 3, 1, 0.6
    wait_until(lambda: only(proxy).load == pytest.approx(0.75))
    gpu.waiting = 20
    wait_until(lambda: only(proxy).load == pytest.approx(4))


def test_stale_load_counts_as_full(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, stale_after_s=0.2, scrape_timeout_s=30)
    gpu.check_scripts["/metrics"] = hang
    wait_until(lambda: only(proxy).load >= 1)
    assert (only(proxy).up, only(proxy).load_parts.stale) == (True, True)
    assert chat(proxy).status_code == 200


def test_requests_sent_since_the_scrape_are_added(start: Start, gpu: Upstream) -> None:
    gpu.running = 3
    proxy = start(backends={"vllm": backend(gpu, slots=10)}, scrape_interval_s=3600)
    release = threading.Event()

    async def holds(talk: Talk) -> None:
        await asyncio.to_thread(release.wait, 10)
        await good(talk)

    gpu.default = holds
    threads = [threading.Thread(target=lambda: chat(proxy)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(gpu.talks) == 2)
    assert only(proxy).load == pytest.approx(0.5)
    release.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: only(proxy).in_flight == 0)
    assert only(proxy).load == pytest.approx(0.3), "requests that have ended do not count"


def test_our_requests_in_the_scrape_count_once(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, slots=10)})
    streaming = Streaming(gpu)
    streaming.start(proxy.url)
    gpu.running = 3  # ours, and two of another proxy
    wait_until(lambda: only(proxy).load == pytest.approx(0.3))
    gpu.running = 2
    streaming.release.set()
    streaming.thread.join(20)
    wait_until(lambda: only(proxy).in_flight == 0)
    assert only(proxy).load == pytest.approx(0.2)


# replicas that answer health checks but fail requests


async def answers_canary(talk: Talk) -> None:
    assert talk.json["max_tokens"] == 1
    await talk.answer(200, whole("1", finish="length"))


def test_breaker_opens_after_three_failures_and_a_canary_closes_it(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.3)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.scripts += [breaks] * 3
    assert [chat(proxy).status_code for _ in range(3)] == [502] * 3
    assert (only(proxy).state, only(proxy).up, only(proxy).breaker.state) == ("suspect", False, "open")
    assert only(proxy).reason.startswith("3 requests failed in a row, the last one: closed without an answer")
    wait_for_checks(gpu, 2)
    assert only(proxy).state == "suspect", "a health check does not close the breaker"
    gpu.scripts.append(answers_canary)
    wait_until(lambda: only(proxy).up)
    assert [talk.path for talk in gpu.talks][3:] == ["/v1/completions"]
    assert chat(proxy).status_code == 200
    assert (only(proxy).state, only(proxy).breaker.failures, only(proxy).breaker.state) == ("up", 0, "closed")


def test_5xx_in_a_row_open_the_breaker_only_if_a_canary_fails(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.scripts += [status(500)] * 3 + [answers_canary]
    assert [chat(proxy).status_code for _ in range(3)] == [502] * 3
    wait_until(lambda: len(gpu.talks) == 4)
    assert gpu.talks[3].path == "/v1/completions"
    assert chat(proxy).status_code == 200
    assert (only(proxy).state, only(proxy).breaker.state) == ("up", "closed")


def test_5xx_from_a_dead_engine_take_it_out_of_rotation(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.2)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.default = status(500)
    assert [chat(proxy).status_code for _ in range(3)] == [502] * 3
    wait_until(lambda: only(proxy).state == "suspect")
    assert only(proxy).reason == "canary failed: /v1/completions returned 500"
    gpu.default = good
    proxy.until_up(1)


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
def test_5xx_alone_never_take_a_replica_out_of_rotation(start: Start, gpu: Upstream, dialect: str) -> None:
    gpu.default = answers_canary
    proxy = start(backends={"other": backend(gpu, dialect=dialect)})

    async def fails_unless_canary(talk: Talk) -> None:
        await (answers_canary if talk.path == "/v1/completions" else status(500))(talk)

    def canaries() -> list[Talk]:
        return [talk for talk in gpu.talks if talk.path == "/v1/completions"]

    gpu.default = fails_unless_canary
    assert [chat(proxy).status_code for _ in range(10)] == [502] * 10
    if dialect == "vllm":
        wait_until(canaries, what="the canary that decides")
    assert only(proxy).up
    assert len(canaries()) == (dialect == "vllm"), "one each 5 s at most"


def test_failed_canary_opens_the_breaker_again(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.default = status(500)
    for _ in range(3):
        chat(proxy)
    wait_until(lambda: len(gpu.talks) >= 5)
    assert only(proxy).state == "suspect"
    assert {talk.path for talk in gpu.talks[3:]} == {"/v1/completions"}


def test_bug_in_a_canary_is_logged_and_the_canary_repeated(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)
    bugs = [RuntimeError("ours")]

    async def buggy(replica: Replica, model: str) -> bool:
        if bugs:
            raise bugs.pop()
        return await ask_canary(replica, model)

    monkeypatch.setattr(health, "ask_canary", buggy)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.scripts += [breaks] * 3
    for _ in range(3):
        chat(proxy)
    wait_until(lambda: only(proxy).up)
    assert not bugs
    assert "RuntimeError: ours" in caplog.text


def test_openai_backend_gets_no_canaries(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.2)
    proxy = start(backends={"other": backend(gpu, dialect="openai")}, canary_interval_s=0.05)
    gpu.scripts += [breaks] * 3
    for _ in range(3):
        chat(proxy)
    assert not only(proxy).up
    wait_until(lambda: only(proxy).up)
    wait_for_checks(gpu, 3)
    assert len(gpu.talks) == 3


def failing_openai(start: Start, gpu: Upstream, cpu: FakeUpstream) -> tuple[RunningProxy, Replica]:
    """A proxy before a GPU of dialect openai that answers 500, and a CPU that is well."""
    gpu.default = status(500)
    proxy = start(backends={"other": backend(gpu, dialect="openai"), "vllm": backend(cpu, device_class="cpu")})
    return proxy, next(replica for replica in proxy.gateway.fleet.replicas if replica.backend_name == "other")


def test_openai_backend_that_fails_what_another_serves_is_taken_out_until_a_request_succeeds(
    start: Start, gpu: Upstream, cpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.3)
    proxy, failing = failing_openai(start, gpu, cpu)
    for seed in range(3):
        assert chat(proxy, seed=seed).headers["x-backend"] == "vllm"
    assert (failing.state, failing.reason) == ("suspect", "it failed requests that others served")
    wait_until(lambda: failing.up)
    assert chat(proxy, seed=9).headers["x-attempts"] == "2"
    assert failing.state == "suspect", "it was on trial"
    gpu.default = good
    wait_until(lambda: failing.up)
    assert chat(proxy).headers["x-backend"] == "other"
    gpu.default = status(500)
    assert chat(proxy).headers["x-backend"] == "vllm"
    assert failing.up, "its trial ended with a success"


def test_one_request_that_is_repeated_takes_no_openai_backend_out(
    start: Start, gpu: Upstream, cpu: FakeUpstream
) -> None:
    proxy, failing = failing_openai(start, gpu, cpu)
    assert {chat(proxy).status_code for _ in range(8)} == {200}
    assert failing.up


def test_canary_finds_a_hung_engine_that_answers_health_checks(
    start: Start, gpu: Upstream, cpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's API process sends 200 and headers for a stopped engine, then nothing."""
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)

    async def hangs(talk: Talk) -> None:
        await talk.start_stream()
        await talk.until_client_leaves()

    gpu.default = hangs
    backends = {"vllm": backend(gpu, first_byte_timeout_s=0.2), "llama_cpp": backend(cpu, device_class="cpu")}
    proxy = start(backends=backends, canary_interval_s=0.1)
    hung = next(replica for replica in proxy.gateway.fleet.replicas if replica.backend_name == "vllm")
    wait_until(lambda: not hung.up)
    assert hung.reason.startswith("canary failed: /v1/completions was not answered within")
    answer = chat(proxy)
    assert (answer.headers["x-backend"], answer.headers["x-attempts"]) == ("llama_cpp", "1")
    gpu.default = good
    wait_until(lambda: hung.up)


@pytest.mark.parametrize("dialect", ["llama-server", "llama-cpp-python"])
def test_silent_llama_cpp_gets_no_canary(start: Start, gpu: Upstream, dialect: str) -> None:
    """It hangs as a whole, and a canary would evict a paused chat from its cache."""
    start(backends={"cpu": backend(gpu, dialect=dialect)}, canary_interval_s=0.05)
    wait_for_checks(gpu, 10)
    assert gpu.talks == []


def test_active_replica_gets_no_canary(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, canary_interval_s=3600)
    before = only(proxy).pool.last_activity
    assert chat(proxy).status_code == 200
    assert only(proxy).pool.last_activity > before
    wait_for_checks(gpu, 3)
    assert [talk.path for talk in gpu.talks] == ["/v1/chat/completions"]
    only(proxy).pool.last_activity -= 3600
    wait_until(lambda: [talk.path for talk in gpu.talks][1:] == ["/v1/completions"])


def test_replica_that_comes_back_starts_slowly(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = start(backends={"vllm": backend(gpu, slots=100)})
    assert only(proxy).capacity == 100 + 16
    gpu.kill()
    wait_until(lambda: only(proxy).state == "down")
    gpu.start()
    wait_until(lambda: only(proxy).up)
    assert 10 <= only(proxy).capacity < 100
    monkeypatch.setattr(circuit_breaker, "SLOW_START_S", 0.0)
    assert only(proxy).capacity == 116


@pytest.mark.parametrize("script", [status(400), status(429), status(503)])
def test_rejected_and_busy_answers_are_not_failures(start: Start, gpu: Upstream, script: Script) -> None:
    gpu.default = script
    proxy = start(backends={"vllm": backend(gpu)})
    for _ in range(4):
        chat(proxy)
    assert (only(proxy).state, only(proxy).breaker.failures) == ("up", 0)


def test_success_between_failures_keeps_the_breaker_closed(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    for _ in range(3):
        gpu.scripts += [status(500), status(500)]
        assert [chat(proxy).status_code for _ in range(3)] == [502, 502, 200]
    assert only(proxy).state == "up"


def test_requests_queued_for_a_suspect_replica_move_to_their_next_tier(
    start: Start, gpu: Upstream, cpu: FakeUpstream
) -> None:
    """At once, not when the replica is up again."""
    fail = threading.Event()

    async def fails_later(talk: Talk) -> None:
        await asyncio.to_thread(fail.wait, 10)
        talk.reset()

    gpu.default = fails_later
    backends = {"big": backend(gpu, dialect="openai", slots=1), "small": backend(cpu, device_class="cpu")}
    proxy = start(backends=backends)
    big = next(replica for replica in proxy.gateway.fleet.replicas if replica.backend_name == "big")
    big.breaker.failures = 2
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(chat(proxy, max_tokens=2000).headers["x-backend"]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(proxy.gateway.admission.queue) == 2)
    fail.set()
    wait_until(lambda: len(answers) == 3, seconds=5)
    assert answers == ["small"] * 3
    assert len(gpu.talks) == 1


def test_requests_queued_for_a_replica_that_comes_back_are_dispatched(start: Start, gpu: Upstream) -> None:
    second = Upstream()
    first_continues, second_continues = threading.Event(), threading.Event()

    def slow(proceed: threading.Event) -> Script:
        async def script(talk: Talk) -> None:
            await asyncio.to_thread(proceed.wait, 10)
            await talk.answer(200, whole())

        return script

    gpu.default, second.default = slow(first_continues), slow(second_continues)
    proxy = start(backends={"only": backend(gpu, second, dialect="openai", slots=1)})
    back = next(replica for replica in proxy.gateway.fleet.replicas if replica.url == second.url)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(chat(proxy).headers["x-replica"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(proxy.gateway.admission.queue) == 1 and gpu.talks and second.talks)
    second.check_scripts["/v1/models"] = status(500)
    wait_until(lambda: back.state == "down")
    second_continues.set()
    wait_until(lambda: answers == [back.name])
    assert len(proxy.gateway.admission.queue) == 1, "its slot is free, but the replica is down"
    second.check_scripts.clear()
    wait_until(lambda: answers == [back.name] * 2)
    first_continues.set()
    for thread in threads:
        thread.join()
    second.close()


def test_health_checks_continue_after_a_bug(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"vllm": backend(gpu)})

    def buggy(page: str) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("xgen_proxy.fleet.health.parse_metrics", buggy)
        wait_for_checks(gpu, 5)
        assert only(proxy).state == "up"
    assert "ZeroDivisionError" in caplog.text
    gpu.running = 7
    wait_until(lambda: only(proxy).load_parts.in_flight == 7)


def test_context_of_a_backend_is_its_smallest_replicas(start: Start, gpu: Upstream) -> None:
    second = Upstream()
    second.check_scripts["/v1/models"] = status(200, {"data": [{"id": "m", "max_model_len": 1024}]})
    proxy = start(backends={"vllm": backend(gpu, second)})
    [vllm] = proxy.gateway.fleet.backends
    assert vllm.context == 1024
    second.close()


def test_metrics_of_the_fake_upstream_are_parsed() -> None:
    assert parse_metrics(METRICS.format(running=1, waiting=2, kv=0.5, preemptions=3).encode()) == {
        "running": 1,
        "waiting": 2,
        "kv": 0.5,
        "preemptions": 3,
    }


def test_a_health_check_without_descriptors_says_nothing_about_the_replica(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"vllm": backend(gpu)})

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "Connection", fail)
        patch.setattr(pool, "MAX_IDLE_S", -1.0)
        wait_until(lambda: caplog.text.count("the proxy is out of resources") >= 3)
        assert only(proxy).up
    assert chat(proxy).status_code == 200


def test_a_canary_without_descriptors_is_repeated(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)
    proxy = start(backends={"vllm": backend(gpu)})
    tried: list[str] = []

    async def fail(*_: object, **__: object) -> None:
        tried.append("")
        raise UpstreamLocalError("Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("xgen_proxy.fleet.health.ask_canary", fail)
        gpu.scripts += [breaks] * 3
        for _ in range(3):
            chat(proxy)
        wait_until(lambda: len(tried) >= 3)
        assert only(proxy).state == "suspect"
    proxy.until_up(1)
