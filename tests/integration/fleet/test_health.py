"""The states of a replica: starting, up, suspect, down, and up again."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import METRICS, FakeUpstream, Script, Talk, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, get
from tests.support.server_process import Streaming
from tests.support.waiting import wait_until
from xgen_proxy.errors import UpstreamLocalError
from xgen_proxy.fleet import circuit_breaker, health
from xgen_proxy.fleet.backend import Replica, State
from xgen_proxy.fleet.load import parse_metrics

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


NOT_READY: dict[str, tuple[str, Script, str]] = {
    "health check returns 503": ("/metrics", status(503), "/metrics returned 503"),
    "models return 503": ("/v1/models", status(503), "still loading"),
    "wrong key": ("/v1/models", status(401), "set the backend's api_key"),
    "forbidden": ("/metrics", status(403), "set the backend's api_key"),
    "no models": ("/v1/models", status(404), ""),
    "models are not JSON": ("/v1/models", status(200, b"<html>"), ""),
    "models are not objects": ("/v1/models", status(200, ["a"]), ""),
    "models have no names": ("/v1/models", status(200, {"data": ["a"]}), ""),
    "metrics are malformed": ("/metrics", status(200, b"vllm:num_requests_running"), ""),
    "metrics are not numbers": ("/metrics", status(200, b"vllm:num_requests_running x"), ""),
}


@pytest.mark.parametrize(("path", "script", "words"), NOT_READY.values(), ids=NOT_READY.keys())
def test_replica_that_is_not_ready_is_down(start: Start, gpu: Upstream, path: str, script: Script, words: str) -> None:
    gpu.check_scripts[path] = script
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    wait_until(lambda: only(proxy).state == "down")
    assert words in only(proxy).reason
    assert get(f"{proxy.url}/ready").status_code == 503
    wait_until(lambda: only(proxy).in_flight == 0)  # a health check holds a slot for a moment
    gpu.check_scripts.clear()
    proxy.until_up(1)


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


@pytest.mark.parametrize("script", [status(500), hang], ids=["500", "silence"])
def test_three_missed_health_checks_mark_it_down(
    start: Start, gpu: Upstream, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_timeout_s=0.05)
    gpu.check_scripts["/metrics"] = script
    wait_until(lambda: only(proxy).state == "down")
    wait_until(lambda: "is down: 3 health checks in a row failed" in caplog.text)
    gpu.check_scripts.clear()
    proxy.until_up(1)


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


def test_replica_without_metrics_has_no_scraped_load(start: Start, gpu: Upstream) -> None:
    """vLLM can be started without /metrics."""
    gpu.check_scripts["/metrics"] = status(404)
    proxy = start(backends={"vllm": backend(gpu)})
    assert (only(proxy).scraped, only(proxy).load) == (None, 0)
    assert get(f"{proxy.url}/models/status").json()["backends"][0]["replicas"][0]["memory"]["kv_usage"] is None


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
    assert chat(proxy).status_code == 503
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
    assert only(proxy).reason == "canary failed: returned 500"
    gpu.default = good
    proxy.until_up(1)


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
def test_5xx_alone_never_take_a_replica_out_of_rotation(start: Start, gpu: Upstream, dialect: str) -> None:
    gpu.default = answers_canary
    proxy = start(backends={"other": backend(gpu, dialect=dialect)})

    async def fails_unless_canary(talk: Talk) -> None:
        await (answers_canary if talk.path == "/v1/completions" else status(500))(talk)

    gpu.default = fails_unless_canary
    assert [chat(proxy).status_code for _ in range(10)] == [502] * 10
    assert only(proxy).up
    canaries = [talk for talk in gpu.talks if talk.path == "/v1/completions"]
    assert len(canaries) <= (dialect == "vllm"), "one each 5 s at most"


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
    post_json, bugs = Replica.post_json, [RuntimeError("ours")]

    async def buggy(replica: Replica, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if bugs:
            raise bugs.pop()
        return await post_json(replica, path, body)

    monkeypatch.setattr(Replica, "post_json", buggy)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.scripts += [status(500)] * 3
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
    hung = next(replica for replica in proxy.gateway.fleet.replicas if replica.backend.name == "vllm")
    wait_until(lambda: not hung.up)
    assert hung.reason.startswith("canary failed: nothing more came within")
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
    big = next(replica for replica in proxy.gateway.fleet.replicas if replica.backend.name == "big")
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
    assert parse_metrics(METRICS.format(running=1, waiting=2, kv=0.5)) == {"running": 1, "waiting": 2, "kv": 0.5}


def test_a_health_check_without_descriptors_says_nothing_about_the_replica(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"vllm": backend(gpu)})

    async def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError("All connection attempts failed") from OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(proxy.gateway.health, "_get", fail)
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
        patch.setattr(Replica, "post_json", fail)
        gpu.scripts += [breaks] * 3
        for _ in range(3):
            chat(proxy)
        wait_until(lambda: len(tried) >= 3)
        assert only(proxy).state == "suspect"
    proxy.until_up(1)
