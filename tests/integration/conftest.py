from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import uvloop

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import RunningProxy, assert_nothing_held, backend
from xgen_proxy.config.settings import Settings


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What is written on asyncio's interface must hold on the loop that serves, and on the plain one."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
def gpu() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture
def cpu() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def fakes() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    """For a `door` that a module's tests share."""
    gpu, cpu = FakeUpstream(), FakeUpstream()
    yield gpu, cpu
    gpu.close()
    cpu.close()


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., RunningProxy]]:
    """start(backends={…}, **settings) → a running proxy whose replicas are all up (pass up=N to expect fewer)."""
    running: list[RunningProxy] = []

    def start(up: int | None = None, **values: Any) -> RunningProxy:
        values.setdefault("scrape_interval_s", 0.05)
        settings = Settings(**values)
        proxy = RunningProxy(settings)
        running.append(proxy)
        proxy.until_up(len(list(proxy.gateway.fleet.replicas)) if up is None else up)
        return proxy

    yield start
    for proxy in running:
        proxy.stop()
        assert_nothing_held(proxy)


@pytest.fixture
def proxy(start: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream) -> RunningProxy:
    """A GPU and a CPU backend, both scripted, both called by their usual names."""
    return start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")})
