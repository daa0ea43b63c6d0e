from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
import uvloop

from proxy.app import create_app
from proxy.gateway import Gateway
from proxy.server import Server, config_for, listen
from proxy.settings import Settings
from tests.integration.fake import FakeUpstream


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What is written on asyncio's interface must hold on the loop that serves, and on the plain one."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Returns the first true value; fails when time is up."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
    return value


class RunningProxy:
    """The real app in a real uvicorn, in a thread, on a free port."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self.gateway: Gateway = self.app.gateway
        sock = listen("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(config_for(self.app, settings), self.app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def until_up(self, count: int) -> None:
        wait_until(lambda: sum(replica.up for replica in self.gateway.fleet.replicas) >= count)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"


def backend(*fakes: FakeUpstream, **values: Any) -> dict[str, Any]:
    """Time to connect in plenty: a machine with too much to do may hold this process up for more than the usual 2 s."""
    return {"urls": [fake.url for fake in fakes], "dialect": "vllm", "connect_timeout_s": 20, **values}


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


def assert_nothing_held(proxy: RunningProxy) -> None:
    """Whatever happened: no slot, no waiter and no connection is left."""
    gateway = proxy.gateway
    assert [replica.in_flight for replica in gateway.fleet.replicas if replica.in_flight] == []
    assert gateway.admission.waiting == []
    assert [replica.name for replica in gateway.fleet.replicas if replica.pool.live] == []


@pytest.fixture
def proxy(start: Callable[..., RunningProxy], gpu: FakeUpstream, cpu: FakeUpstream) -> RunningProxy:
    """A GPU and a CPU backend, both scripted, both called by their usual names."""
    return start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, path="cpu")})


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


# httpx reads all certificate authorities for each call (35 ms), though nothing here has TLS
get = functools.partial(httpx.get, verify=False, timeout=20)
post = functools.partial(httpx.post, verify=False, timeout=20)


def chat(proxy: RunningProxy, timeout: float = 20, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    return post(f"{proxy.url}/v1/chat/completions", json={**CHAT, **fields}, headers=headers, timeout=timeout)
