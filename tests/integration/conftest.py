from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import RunningProxy, backend, running_proxy


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run async tests on uvloop, which serves in production, and on asyncio's own loop."""
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
def fake() -> Iterator[FakeUpstream]:
    """For a proxy that a module's tests share."""
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def fakes() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    """For a proxy that a module's tests share."""
    gpu, cpu = FakeUpstream(), FakeUpstream()
    yield gpu, cpu
    gpu.close()
    cpu.close()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningProxy]]:
    """start(backends={…}, **settings) → a running proxy whose replicas are all up (pass up=N to expect fewer)."""
    with contextlib.ExitStack() as running:
        yield lambda **values: running.enter_context(running_proxy(**values))


@pytest.fixture
def proxy(start: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream) -> RunningProxy:
    """A GPU backend `vllm` and a CPU backend `llama_cpp`, both scripted."""
    return start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")})
