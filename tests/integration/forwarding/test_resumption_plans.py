"""Who may take over a broken stream: whoever can, however busy the fleet is and whatever happened before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.integration.forwarding.test_resumption import LAST, count, cut_after, read, reset, stream
from tests.support.counting_upstream import counter
from tests.support.fake_upstream import FakeUpstream, Script, Talk, status
from tests.support.running_proxy import RunningProxy, backend
from tests.support.waiting import wait_until
from xgen_proxy.fleet import circuit_breaker
from xgen_proxy.forwarding import resumption

Start = Callable[..., RunningProxy]
LONG = 2000  # tokens, which go to the GPU


@pytest.fixture(autouse=True)
def never_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circuit_breaker, "FAILURES", 10**9)


@pytest.fixture
def other() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


def in_turn(*scripts: Script) -> Script:
    """For several servers: each request gets the next script, and after them a complete answer."""
    left = list(scripts)

    async def script(talk: Talk) -> None:
        done = "tokenize" in talk.path or not left
        await (counter(LAST) if done else left.pop(0))(talk)

    return script


@pytest.mark.parametrize(
    "scripts",
    [(status(503), cut_after(3, reset)), (cut_after(2, reset), cut_after(2, reset))],
    ids=["it was busy before", "it broke before"],
)
def test_a_replica_that_failed_earlier_takes_over(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, scripts: tuple[Script, ...]
) -> None:
    """As in a rolling restart of two replicas."""
    gpu.default = cpu.default = in_turn(*scripts)
    answer = stream(start(backends={"vllm": backend(gpu, cpu)}))
    assert read(answer)[0] == count()
    asked = [len([talk for talk in each.talks if "tokenize" not in talk.path]) for each in (gpu, cpu)]
    assert sorted(asked) == [1, 2]


def test_a_stream_that_gets_no_further_is_planned_once(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.default = cpu.default = in_turn(cut_after(2, reset), *[cut_after(0, reset)] * 20)
    assert "stream_broken" in stream(start(backends={"vllm": backend(gpu, cpu)})).text
    assert len([talk for talk in gpu.talks + cpu.talks if "tokenize" not in talk.path]) == 2


def test_a_stream_is_planned_a_few_times_only(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    async def one_more(talk: Talk) -> None:
        await (counter(99) if "tokenize" in talk.path else cut_after(1, reset, last=99))(talk)

    gpu.default = cpu.default = one_more
    assert "stream_broken" in stream(start(backends={"vllm": backend(gpu, cpu)})).text
    assert len([talk for talk in gpu.talks + cpu.talks if "tokenize" not in talk.path]) == 1 + resumption.PLANS


def test_the_broken_replica_takes_no_place_in_the_plan(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    gpu.default = cpu.default = in_turn(cut_after(2, reset))
    proxy = start(backends={"vllm": backend(gpu, cpu)}, routing={"max_attempts": 1})
    assert read(stream(proxy))[0] == count()


def test_a_client_that_wants_no_fallback_gets_no_other_backends_words(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream
) -> None:
    cpu.default = counter(LAST)
    proxy = start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")})
    [replica] = proxy.gateway.fleet.backends_by_name["vllm"].replicas

    async def vanish(talk: Talk) -> None:
        assert gpu._server is not None
        gpu._server.close()
        await asyncio.to_thread(wait_until, lambda: not replica.up)
        await reset(talk)

    gpu.scripts.append(cut_after(2, vanish))
    assert "stream_broken" in stream(proxy, headers={"x-fallback": "none"}).text
    assert cpu.talks == []


def waiting(release: threading.Event) -> Script:
    """A complete answer, once it is released."""

    async def script(talk: Talk) -> None:
        await asyncio.to_thread(release.wait, 60)
        await counter(LAST)(talk)

    return script


def test_a_stream_does_not_wait_for_a_gpu_while_a_cpu_is_free(
    start: Start, gpu: FakeUpstream, other: FakeUpstream, cpu: FakeUpstream
) -> None:
    """Its client has half an answer."""
    release, broken = threading.Event(), threading.Event()

    async def breaks(talk: Talk) -> None:
        await asyncio.to_thread(broken.wait, 60)
        await reset(talk)

    gpu.default = other.default = in_turn(cut_after(2, breaks), waiting(release))
    cpu.default = counter(LAST)
    gpus = backend(gpu, other, dialect="llama-server", device_class="gpu", slots=1)
    proxy = start(backends={"gpus": gpus, "cpu": backend(cpu, dialect="llama-server", device_class="cpu")})
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(partial(stream, proxy, max_tokens=LONG))
        wait_until(lambda: gpu.talks or other.talks, 30)
        second = pool.submit(partial(stream, proxy, max_tokens=LONG))
        wait_until(lambda: gpu.talks and other.talks, 30)
        broken.set()
        answer = first.result(60)
        release.set()
        assert read(second.result(60))[0] == count()
    assert read(answer)[0] == count()
    assert f": resumed on cpu@127.0.0.1:{cpu.port}" in answer.text


def test_a_full_queue_keeps_no_stream_from_being_resumed(start: Start, gpu: FakeUpstream, other: FakeUpstream) -> None:
    release, broken = threading.Event(), threading.Event()

    async def breaks(talk: Talk) -> None:
        await asyncio.to_thread(broken.wait, 60)
        await reset(talk)

    gpu.default = other.default = in_turn(cut_after(2, breaks), waiting(release))
    servers = backend(gpu, other, dialect="llama-server", slots=1)
    proxy = start(backends={"llama": servers}, limits={"queue": 0})
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stream, proxy)
        wait_until(lambda: gpu.talks or other.talks, 30)
        second = pool.submit(stream, proxy)
        wait_until(lambda: gpu.talks and other.talks, 30)
        broken.set()
        wait_until(lambda: proxy.gateway.admission.queue, 30)
        release.set()
        assert [read(each.result(60))[0] for each in (first, second)] == [count()] * 2


def test_streams_that_have_begun_elsewhere_are_no_retries(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """More of them than the retry budget has places."""
    release = threading.Event()

    async def then_wait(talk: Talk) -> None:
        await asyncio.to_thread(release.wait, 60)
        await reset(talk)

    gpu.default = status(503)
    cpu.default = in_turn(*[cut_after(1, then_wait)] * 6)
    proxy = start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")})
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(stream, proxy, continuation="none") for _ in range(6)]
        wait_until(lambda: len(cpu.talks) == 6, 30)
        assert proxy.gateway.forwarder.retry_budget.retrying == 0
        release.set()
        assert all("stream_broken" in each.result(60).text for each in asked)
