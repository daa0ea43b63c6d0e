"""The memory guard in a running proxy: what it observes, what it tells, and whom the requests go to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, good, status
from tests.support.running_proxy import CHAT, RunningProxy, backend, chat, get, post
from tests.support.waiting import wait_until
from xgen_proxy.fleet.memory import pressure, ram, watch
from xgen_proxy.fleet.memory.pressure import Room
from xgen_proxy.fleet.replica import Replica

Start = Callable[..., RunningProxy]
GIB = 1024**3


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "DWELL_S", 0.1)
    monkeypatch.setattr(pressure, "GROWTH_S", 0.01)


class Upstream(FakeUpstream):
    """Its answer to /reset_prefix_cache can be scripted."""

    def __post_init__(self) -> None:
        self.reset: Script = status(200, {"success": True})
        self.resets: list[Talk] = []
        self.default = self._answer
        super().__post_init__()

    async def _answer(self, talk: Talk) -> None:
        if talk.path == "/reset_prefix_cache":
            self.resets.append(talk)
            await self.reset(talk)
        else:
            await good(talk)


@pytest.fixture
def gpu() -> Iterator[Upstream]:
    fake = Upstream()
    yield fake
    fake.close()


def both(gpu: FakeUpstream, cpu: FakeUpstream) -> dict[str, object]:
    return {"vllm": backend(gpu, slots=8), "llama_cpp": backend(cpu, dialect="llama-server", slots=8)}


def vllm(proxy: RunningProxy) -> Replica:
    return next(iter(proxy.gateway.fleet.backends_by_name["vllm"].replicas))


def until_level(proxy: RunningProxy, level: str | None) -> None:
    wait_until(lambda: (pressed.level if (pressed := vllm(proxy).pressure) else None) == level)


def test_a_full_cache_closes_the_replica_and_short_work_spills(
    start: Start, gpu: Upstream, cpu: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "xgen_proxy.memory")
    proxy = start(backends=both(gpu, cpu))
    assert chat(proxy).headers["x-backend"] == "vllm"
    gpu.kv = 0.98
    until_level(proxy, "closed")
    answer = chat(proxy)
    assert answer.headers["x-backend"] == "llama_cpp"
    assert answer.headers["x-route-reason"] == "default_spill: GPU closed, memory: KV cache 98% used"
    [shown] = [each for each in get(f"{proxy.url}/models/status").json()["backends"] if each["name"] == "vllm"]
    assert shown["replicas"][0]["memory"]["pressure"] == {
        "level": "closed", "limit": None, "reason": "memory: KV cache 98% used",
    }  # fmt: skip
    [planned] = [
        each for each in post(f"{proxy.url}/route", json=CHAT).json()["candidates"] if each["backend"] == "vllm"
    ]
    assert planned["memory"] == "memory: KV cache 98% used"
    page = get(f"{proxy.url}/metrics").text
    assert f'xgen_replica_memory_pressure{{backend="vllm",replica="{vllm(proxy).name}"}} 2.0' in page
    gpu.kv = 0.1
    until_level(proxy, None)
    assert chat(proxy).headers["x-backend"] == "vllm"
    log = caplog.text
    told = [log.find(f"{vllm(proxy).name} {words}: memory: ") for words in (*watch.WORDS[1:], watch.WORDS[0])]
    assert -1 < told[0] < told[1] < told[2]


def test_alone_and_closed_it_still_serves(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, slots=8)})
    gpu.kv = 1.0
    until_level(proxy, "closed")
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(chat(proxy).status_code)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 4


def test_preemptions_reduce_and_are_counted(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, slots=8)})
    gpu.running, gpu.preemptions = 4, 2
    until_level(proxy, "reduced")
    assert 'xgen_preemptions_total{backend="vllm"' in get(f"{proxy.url}/metrics").text


def test_the_guard_can_be_turned_off(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, memory_guard={"enabled": False})
    gpu.kv, gpu.preemptions = 1.0, 9
    wait_until(lambda: vllm(proxy).scraped is not None and vllm(proxy).scraped.preemptions == 9)  # type: ignore[union-attr]
    assert vllm(proxy).pressure is None


def test_a_replica_that_went_down_begins_anew(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kv = 1.0
    until_level(proxy, "closed")
    gpu.kill()
    wait_until(lambda: vllm(proxy).state == "down")
    assert vllm(proxy).pressure is None


def test_a_slow_start_is_forgotten_once_it_is_over(start: Start, gpu: Upstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    vllm(proxy).breaker.slow_start_at = -1e9
    wait_until(lambda: vllm(proxy).breaker.slow_start_at is None)


def test_ram_of_replicas_on_this_machine(start: Start, gpu: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [0.1]
    monkeypatch.setattr(ram, "machine_room", lambda: Room(int(left[0] * GIB), 8 * GIB, "this machine"))
    monkeypatch.setattr(ram, "cgroup_of", lambda pid: None)
    proxy = start(backends={"vllm": backend(gpu)}, memory_guard={"enabled": True})
    until_level(proxy, "closed")
    assert vllm(proxy).pressure is not None
    assert vllm(proxy).pressure.reason == "memory: 0.1 of 8.0 GiB of this machine left"  # type: ignore[union-attr]
    left[0] = 7
    until_level(proxy, None)


RESETS = {
    "done": status(200, {"success": True}),
    "refused": status(200, {"success": False}),
    "failed": status(500),
    "missing": status(404),
}


@pytest.mark.parametrize("result", RESETS)
def test_relief_is_asked_for_once_and_counted(
    start: Start, gpu: Upstream, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "RELIEF_INTERVAL_S", 0)
    gpu.reset = RESETS[result]
    proxy = start(
        backends={"vllm": backend(gpu)},
        memory_guard={"enabled": True, "ram_reduce": 1, "ram_close": 1, "relief": "reset_prefix_cache"},
    )
    series = f'xgen_memory_relief_total{{backend="vllm",replica="{vllm(proxy).name}",result="{result}"}}'
    for episode in (1, 2):
        gpu.kv = 0.95
        until_level(proxy, "reduced")
        asked = 1 if result == "missing" else episode
        wait_until(lambda: f"{series} {asked}.0" in get(f"{proxy.url}/metrics").text)  # noqa: B023
        gpu.kv = 0.1
        until_level(proxy, None)
        assert len(gpu.resets) == asked


def test_an_engine_without_relief_is_asked_again_once_it_was_restarted(start: Start, gpu: Upstream) -> None:
    gpu.reset, gpu.kv = RESETS["missing"], 0.95
    proxy = start(
        backends={"vllm": backend(gpu)},
        memory_guard={"enabled": True, "ram_reduce": 1, "ram_close": 1, "relief": "reset_prefix_cache"},
    )
    wait_until(lambda: len(gpu.resets) == 1)
    gpu.kill()
    wait_until(lambda: vllm(proxy).state == "down")
    gpu.start()
    until_level(proxy, "reduced")
    wait_until(lambda: len(gpu.resets) == 2)


def test_relief_waits_until_nothing_runs(start: Start, gpu: Upstream) -> None:
    gpu.kv, gpu.running = 0.95, 1
    proxy = start(
        backends={"vllm": backend(gpu)},
        memory_guard={"enabled": True, "ram_reduce": 1, "ram_close": 1, "relief": "reset_prefix_cache"},
    )
    until_level(proxy, "reduced")
    scraped = vllm(proxy).scraped
    wait_until(lambda: vllm(proxy).scraped is not scraped)
    assert gpu.resets == []
    gpu.running = 0
    wait_until(lambda: len(gpu.resets) == 1)
