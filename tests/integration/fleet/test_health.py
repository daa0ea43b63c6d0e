"""What the proxy believes of a replica: starting, up, suspect, down, and up again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.fake_upstream import METRICS, FakeUpstream, Script, Talk, good, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, get, wait_until
from tests.support.server_process import Streaming
from xgen_proxy.fleet import circuit_breaker, health
from xgen_proxy.fleet.backend import Replica, State
from xgen_proxy.fleet.load import parse_metrics
from xgen_proxy.request.features import Json

Start = Callable[..., RunningProxy]


class Upstream(FakeUpstream):
    """Its answers to looks can be scripted: path → script; other paths are answered as ever."""

    def __post_init__(self) -> None:
        self.looks: dict[str, Script] = {}
        self.looked: list[Talk] = []
        super().__post_init__()

    async def _look(self, talk: Talk) -> None:
        self.looked.append(talk)
        look = self.looks.get(talk.path)
        await (look(talk) if look else super()._look(talk))


@pytest.fixture
def gpu() -> Iterator[Upstream]:
    fake = Upstream()
    yield fake
    fake.close()


def only(proxy: RunningProxy) -> Replica:
    [replica] = proxy.gateway.fleet.replicas
    return replica


def looks(fake: Upstream, count: int) -> None:
    """Waits for so many looks from now on."""
    before = len(fake.looked)
    wait_until(lambda: len(fake.looked) >= before + count)


async def hang(talk: Talk) -> None:
    await talk.until_client_leaves()


def test_not_there_at_first(start: Start, gpu: Upstream) -> None:
    gpu.kill()
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    wait_until(lambda: only(proxy).state == "down")
    assert only(proxy).reason
    gpu.start()
    proxy.until_up(1)
    assert (only(proxy).state, only(proxy).reason) == ("up", "answers")
    assert chat(proxy).status_code == 200


def test_a_proxy_that_answers_has_looked(start: Start, gpu: Upstream) -> None:
    """Else one that has just been started refuses, for a moment, what the proxy beside it can do."""

    async def slowly(talk: Talk) -> None:
        await asyncio.sleep(0.5)
        await FakeUpstream._look(gpu, talk)

    gpu.looks["/metrics"] = slowly
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    assert chat(proxy).status_code == 200


def test_one_that_hangs_does_not_hold_up_the_start(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "INITIAL_CHECKS_S", 0.2)
    gpu.looks["/metrics"] = hang
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    assert only(proxy).state == "starting"


def test_up_says_what_it_can_do(start: Start, gpu: Upstream) -> None:
    gpu.models = ["a", "b"]
    proxy = start(backends={"vllm": backend(gpu)})
    [vllm] = proxy.gateway.fleet.backends
    assert (set(vllm.models), vllm.context) == ({"a", "b"}, 2048)
    assert only(proxy).in_flight == 0


def test_another_model_after_a_restart(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kill()
    wait_until(lambda: only(proxy).state == "down")
    gpu.models = ["new"]
    gpu.start()
    wait_until(lambda: proxy.gateway.fleet.models == ["new"])


LOADING: dict[str, tuple[str, Script, str]] = {
    "the look says 503": ("/metrics", status(503), "/metrics says 503"),
    "the models say 503": ("/v1/models", status(503), "still loading"),
    "wrong key": ("/v1/models", status(401), "set the backend's api_key"),
    "forbidden": ("/metrics", status(403), "set the backend's api_key"),
    "no models": ("/v1/models", status(404), ""),
    "models that are no JSON": ("/v1/models", status(200, b"<html>"), ""),
    "models that are none": ("/v1/models", status(200, ["a"]), ""),
    "models without names": ("/v1/models", status(200, {"data": ["a"]}), ""),
    "metrics that are none": ("/metrics", status(200, b"vllm:num_requests_running"), ""),
    "metrics without numbers": ("/metrics", status(200, b"vllm:num_requests_running x"), ""),
}


@pytest.mark.parametrize(("path", "look", "words"), LOADING.values(), ids=LOADING.keys())
def test_not_ready_yet(start: Start, gpu: Upstream, path: str, look: Script, words: str) -> None:
    gpu.looks[path] = look
    proxy = start(up=0, backends={"vllm": backend(gpu)})
    wait_until(lambda: only(proxy).state == "down")
    assert words in only(proxy).reason
    assert get(f"{proxy.url}/ready").status_code == 503
    wait_until(lambda: only(proxy).in_flight == 0)  # but while it is asked again
    gpu.looks.clear()
    proxy.until_up(1)


def test_keys_are_shown_when_looking(start: Start, gpu: Upstream) -> None:
    start(backends={"vllm": backend(gpu, api_key="hush")})
    assert {talk.headers.get("authorization") for talk in gpu.looked} == {"Bearer hush"}


def test_a_busy_server_may_miss_a_look(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_timeout_s=0.5)
    misses = iter([status(500), status(502)])

    async def missing_twice(talk: Talk) -> None:
        script = next(misses, None)
        await (script(talk) if script else FakeUpstream._look(gpu, talk))

    seen: list[str] = []
    turn = only(proxy).set_state

    def noting(state: State, why: str) -> bool:
        seen.append(state)
        return turn(state, why)

    monkeypatch.setattr(only(proxy), "set_state", noting)
    gpu.looks["/metrics"] = missing_twice
    looks(gpu, 5)
    assert (seen, only(proxy).state) == ([], "up")


@pytest.mark.parametrize("look", [status(500), hang], ids=["500", "silence"])
def test_three_in_a_row_are_believed(
    start: Start, gpu: Upstream, look: Script, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_timeout_s=0.05)
    gpu.looks["/metrics"] = look
    wait_until(lambda: only(proxy).state == "down")
    wait_until(lambda: "is down: 3 looks in a row failed" in caplog.text)
    gpu.looks.clear()
    proxy.until_up(1)


def test_a_refused_connection_is_believed_at_once(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, scrape_interval_s=3600)
    gpu.kill()
    assert chat(proxy).status_code == 503
    assert only(proxy).state == "down"
    assert only(proxy).scraped is None


def test_load_is_what_the_page_says(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, slots=10)})
    assert only(proxy).load == 0
    gpu.running, gpu.waiting, gpu.kv = 3, 1, 0.6
    wait_until(lambda: only(proxy).load == pytest.approx(0.75))
    gpu.waiting = 20
    wait_until(lambda: only(proxy).load == pytest.approx(4))


def test_load_that_is_stale_counts_as_full(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, stale_after_s=0.2, scrape_timeout_s=30)
    gpu.looks["/metrics"] = hang
    wait_until(lambda: only(proxy).load >= 1)
    assert (only(proxy).up, only(proxy).load_parts.stale) == (True, True)
    assert chat(proxy).status_code == 200


def test_no_page_is_no_load(start: Start, gpu: Upstream) -> None:
    """vLLM can be started without it."""
    gpu.looks["/metrics"] = status(404)
    proxy = start(backends={"vllm": backend(gpu)})
    assert (only(proxy).scraped, only(proxy).load) == (None, 0)
    assert get(f"{proxy.url}/models/status").json()["backends"][0]["replicas"][0]["memory"]["kv_usage"] is None


def test_requests_sent_since_the_look_are_added_to_it(start: Start, gpu: Upstream) -> None:
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
    assert only(proxy).load == pytest.approx(0.3), "what is answered already is no load"


def test_ours_that_a_look_has_seen_are_not_taken_for_others(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, slots=10)})
    streaming = Streaming(gpu)
    streaming.start(proxy.url)
    gpu.running = 3  # ours, and two of somebody else
    wait_until(lambda: only(proxy).load == pytest.approx(0.3))
    gpu.running = 2
    streaming.release.set()
    streaming.thread.join(20)
    wait_until(lambda: only(proxy).in_flight == 0)
    assert only(proxy).load == pytest.approx(0.2)


# who answers looks but fails requests


async def counts_probes(talk: Talk) -> None:
    assert talk.json["max_tokens"] == 1
    await talk.answer(200, whole("1", finish="length"))


def test_open_after_three_failures_and_closed_again_by_a_probe(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.3)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.scripts += [status(500)] * 3
    assert [chat(proxy).status_code for _ in range(3)] == [502] * 3
    assert (only(proxy).state, only(proxy).up, only(proxy).breaker.state) == ("suspect", False, "open")
    assert only(proxy).reason.startswith("3 requests failed in a row, the last one: says 500")
    assert chat(proxy).status_code == 503
    looks(gpu, 2)
    assert only(proxy).state == "suspect", "an answer to a look is no answer to a request"
    gpu.scripts.append(counts_probes)
    wait_until(lambda: only(proxy).up)
    assert [talk.path for talk in gpu.talks][3:] == ["/v1/completions"]
    assert chat(proxy).status_code == 200
    assert (only(proxy).state, only(proxy).breaker.failures, only(proxy).breaker.state) == ("up", 0, "closed")


def test_a_failed_probe_opens_it_for_longer(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.default = status(500)
    for _ in range(3):
        chat(proxy)
    wait_until(lambda: len(gpu.talks) >= 5)
    assert only(proxy).state == "suspect"
    assert {talk.path for talk in gpu.talks[3:]} == {"/v1/completions"}


def test_a_fault_of_ours_in_a_probe_is_told_and_probed_again(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)
    ask, faults = health.ask, [RuntimeError("ours")]

    async def faulty(replica: Replica, path: str, body: Json) -> tuple[int, Any]:
        if faults:
            raise faults.pop()
        return await ask(replica, path, body)

    monkeypatch.setattr(health, "ask", faulty)
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.scripts += [status(500)] * 3
    for _ in range(3):
        chat(proxy)
    wait_until(lambda: only(proxy).up)
    assert not faults
    assert "RuntimeError: ours" in caplog.text


def test_where_tokens_may_cost_money_nobody_probes(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.2)
    proxy = start(backends={"other": backend(gpu, dialect="openai")}, canary_interval_s=0.05)
    gpu.scripts += [status(500)] * 3
    for _ in range(3):
        chat(proxy)
    assert not only(proxy).up
    wait_until(lambda: only(proxy).up)
    looks(gpu, 3)
    assert len(gpu.talks) == 3


def test_a_hung_engine_that_answers_looks_is_found_by_a_probe(start: Start, gpu: Upstream, cpu: FakeUpstream) -> None:
    """As vLLM's API process does for a stopped engine: 200 and headers, then nothing."""

    async def hangs(talk: Talk) -> None:
        await talk.start_stream()
        await talk.until_client_leaves()

    gpu.default = hangs
    backends = {"vllm": backend(gpu, first_byte_timeout_s=0.2), "llama_cpp": backend(cpu, device_class="cpu")}
    proxy = start(backends=backends, canary_interval_s=0.1)
    hung = next(replica for replica in proxy.gateway.fleet.replicas if replica.backend.name == "vllm")
    wait_until(lambda: not hung.up)
    assert hung.reason.startswith("no token for a probe: nothing more came within")
    answer = chat(proxy)
    assert (answer.headers["x-backend"], answer.headers["x-attempts"]) == ("llama_cpp", "1")
    gpu.default = good
    hung.breaker._until = 0.0
    wait_until(lambda: hung.up)


@pytest.mark.parametrize("dialect", ["llama-server", "llama-cpp-python"])
def test_a_silent_llama_cpp_keeps_its_cache(start: Start, gpu: Upstream, dialect: str) -> None:
    """It hangs as a whole, and a probe would take the place of a chat that pauses."""
    start(backends={"cpu": backend(gpu, dialect=dialect)}, canary_interval_s=0.05)
    looks(gpu, 10)
    assert gpu.talks == []


def test_who_talks_is_not_probed(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, canary_interval_s=3600)
    before = only(proxy).pool.last_activity
    assert chat(proxy).status_code == 200
    assert only(proxy).pool.last_activity > before
    looks(gpu, 3)
    assert [talk.path for talk in gpu.talks] == ["/v1/chat/completions"]
    only(proxy).pool.last_activity -= 3600
    wait_until(lambda: [talk.path for talk in gpu.talks][1:] == ["/v1/completions"])


def test_who_comes_back_gets_its_slots_bit_by_bit(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_refusing_and_being_busy_are_no_failures(start: Start, gpu: Upstream, script: Script) -> None:
    gpu.default = script
    proxy = start(backends={"vllm": backend(gpu)})
    for _ in range(4):
        chat(proxy)
    assert (only(proxy).state, only(proxy).breaker.failures) == ("up", 0)


def test_good_answers_between_failures_keep_it_up(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    for _ in range(3):
        gpu.scripts += [status(500), status(500)]
        assert [chat(proxy).status_code for _ in range(3)] == [502, 502, 200]
    assert only(proxy).state == "up"


def test_who_waits_for_a_replica_that_becomes_suspect_goes_on(start: Start, gpu: Upstream, cpu: FakeUpstream) -> None:
    """With the rest of its plan, at once, not when the replica is trusted again."""
    fail = threading.Event()

    async def fails_when_told(talk: Talk) -> None:
        await asyncio.to_thread(fail.wait, 10)
        await talk.answer(500, {})

    gpu.default = fails_when_told
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


def test_who_waits_for_a_replica_that_comes_back_gets_it(start: Start, gpu: Upstream) -> None:
    second = Upstream()
    first_goes_on, second_goes_on = threading.Event(), threading.Event()

    def slow(go_on: threading.Event) -> Script:
        async def script(talk: Talk) -> None:
            await asyncio.to_thread(go_on.wait, 10)
            await talk.answer(200, whole())

        return script

    gpu.default, second.default = slow(first_goes_on), slow(second_goes_on)
    proxy = start(backends={"only": backend(gpu, second, dialect="openai", slots=1)})
    back = next(replica for replica in proxy.gateway.fleet.replicas if replica.url == second.url)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(chat(proxy).headers["x-replica"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(proxy.gateway.admission.queue) == 1 and gpu.talks and second.talks)
    second.looks["/v1/models"] = status(500)
    wait_until(lambda: back.state == "down")
    second_goes_on.set()
    wait_until(lambda: answers == [back.name])
    assert len(proxy.gateway.admission.queue) == 1, "its slot is free, but it is down"
    second.looks.clear()
    wait_until(lambda: answers == [back.name] * 2)
    first_goes_on.set()
    for thread in threads:
        thread.join()
    second.close()


def test_looking_goes_on_after_a_fault_of_our_own(
    start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(backends={"vllm": backend(gpu)})

    def fault(page: str) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("xgen_proxy.fleet.health.parse_metrics", fault)
        looks(gpu, 5)
        assert only(proxy).state == "up"
    assert "ZeroDivisionError" in caplog.text
    gpu.running = 7
    wait_until(lambda: only(proxy).load_parts.in_flight == 7)


def test_of_two_replicas_the_least_is_promised(start: Start, gpu: Upstream) -> None:
    """Replicas are interchangeable: the backend's context is the smaller one."""
    second = Upstream()
    second.looks["/v1/models"] = status(200, {"data": [{"id": "m", "max_model_len": 1024}]})
    proxy = start(backends={"vllm": backend(gpu, second)})
    [vllm] = proxy.gateway.fleet.backends
    assert vllm.context == 1024
    second.close()


def test_the_page_of_the_fake_is_one_that_the_proxy_reads() -> None:
    assert parse_metrics(METRICS.format(running=1, waiting=2, kv=0.5)) == {"running": 1, "waiting": 2, "kv": 0.5}
