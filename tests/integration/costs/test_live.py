"""What the traffic of a running proxy costs, from its real /metrics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import RunningProxy, backend, chat, running_proxy
from tests.support.waiting import wait_until
from tests.unit.costs.builders import machine
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.costs import live
from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.live import Page, Traffic
from xgen_proxy.costs.prices import Prices

PRICES = Prices("$", (machine("gpu", 3.6), machine("cpu", 0.36, 0.36, replicas=2)))


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    gpu, cpu = fakes
    backends = {"vllm": backend(gpu, models={"big": "m"}), "vllm_2": backend(cpu, models={"small": "m"})}
    with running_proxy(backends=backends) as running:
        yield running


def served(page: Page, name: str) -> float:
    return sum(live.values(page, "xgen_requests_total", backend=name, status="2").values())


def test_requests_and_tokens_are_counted_by_backend(proxy: RunningProxy) -> None:
    before = live.fetch(proxy.url, None)
    for model in ("big", "big", "small"):
        assert chat(proxy, model=model).status_code == 200
    wait_until(lambda: served(live.fetch(proxy.url, None), "vllm") == served(before, "vllm") + 2)
    wait_until(lambda: served(live.fetch(proxy.url, None), "vllm_2") == served(before, "vllm_2") + 1)
    big, small = live.traffic([before, live.fetch(proxy.url, None)], 2.0)
    assert (big.backend, big.device_class, big.replicas) == ("vllm", "gpu", 1)
    assert (big.requests, big.tokens_in, big.tokens_out, big.seconds) == (2, 6, 2, 2.0)
    assert (small.backend, small.requests) == ("vllm_2", 1)


def test_watching(proxy: RunningProxy) -> None:
    seen: list[int] = []
    before = served(live.fetch(proxy.url, None), "vllm")

    def progress(seconds: int) -> None:
        if not seen:
            assert chat(proxy, model="big").status_code == 200
            # it is counted a moment after its end
            wait_until(lambda: served(live.fetch(proxy.url, None), "vllm") == before + 1)
        seen.append(seconds)

    big, small = live.watch(proxy.url, None, 0.3, progress)
    assert big.requests == 1
    assert small.requests == 0
    assert big.seconds >= 0.3
    assert seen == sorted(seen)
    assert seen


def test_a_proxy_with_keys(fake: FakeUpstream) -> None:
    with running_proxy(backends={"vllm": backend(fake)}, api_keys=[hash_key("sesame")]) as proxy:
        assert live.fetch(proxy.url, "sesame")


def test_no_proxy_there(fake: FakeUpstream) -> None:
    with pytest.raises(CostError, match=r"no proxy answers at http://127.0.0.1:1 .*start one with `xgen-proxy serve`"):
        live.fetch("http://127.0.0.1:1", None)
    with pytest.raises(CostError, match="is not an xgen-proxy: 200 for /metrics"):
        live.fetch(fake.url, None)


# Without a proxy


def page(slots: float, in_flight: float, served: float) -> Page:
    labels = (("backend", "vllm"), ("replica", "vllm-1"))
    return {
        ("xgen_backend_device_class", (("backend", "vllm"), ("device_class", "gpu"))): 1.0,
        ("xgen_replica_up", labels): 1.0,
        ("xgen_replica_slots", labels): slots,
        ("xgen_replica_in_flight", labels): in_flight,
        ("xgen_requests_total", (*labels, ("status", "200"))): served,
        ("xgen_requests_total", (*labels, ("status", "502"))): served * 10,
    }


def test_slots_in_use_are_a_mean_over_time() -> None:
    [found] = live.traffic([page(4, 0, 10), page(4, 2, 10), page(4, 8, 15)], 1.0)
    assert found.busy == pytest.approx((0 + 0.5 + 1) / 3)
    assert found.requests == 5


def test_counters_that_began_anew_count_for_nothing() -> None:
    [found] = live.traffic([page(0, 0, 100), page(0, 0, 3)], 1.0)
    assert (found.requests, found.busy) == (0.0, 0.0)


def traffic(backend: str, device_class: str, requests: float, replicas: int = 1, busy: float = 0.5) -> Traffic:
    return Traffic(
        backend=backend,
        device_class=device_class,
        replicas=replicas,
        busy=busy,
        requests=requests,
        tokens_in=0.0,
        tokens_out=requests * 10,
        seconds=100.0,
    )


def test_the_report() -> None:
    """Idle machines cost, too: all of them together served 2 requests/s for 4.68 an hour."""
    found = [traffic("vllm", "gpu", 200), traffic("llama_cpp", "cpu", 0, replicas=3)]
    lines = [line.split() for line in live.report(PRICES, found).splitlines()]
    assert ["vllm", "1", "gpu", "50", "%", "200", "3.60", "0.500", "50.0"] in lines
    assert ["llama_cpp", "2", "cpu", "50", "%", "0", "1.08", "-", "-"] in lines
    assert ["all", "200", "4.68", "0.650", "65.0"] in lines
    assert lines[-1][:4] == ["watched", "for", "100", "s;"]


def test_a_backend_without_a_price() -> None:
    with pytest.raises(CostError, match="no machine named other or tpu, only gpu, cpu"):
        live.report(PRICES, [traffic("other", "tpu", 1)])
