"""nginx with its shipped configuration, in front of a scripted or a real proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.nginx import NameServer, Nginx, UnavailableError, runner
from tests.support.nginx_client import (
    wait_for_addresses,
    wait_ready,
)
from tests.support.real_servers import Proxy
from tests.support.unavailable import unavailable

NO_CANARIES = {"XGEN_CANARY_INTERVAL_S": "0"}  # a canary would use up a script meant for the test

StartNginx = Callable[..., Nginx]


@pytest.fixture(scope="module")
def nginx_runner() -> str:
    try:
        return runner()
    except UnavailableError as error:
        unavailable(f"NOT TESTED WITH nginx: {error}")


@pytest.fixture(scope="module")
def start_nginx(nginx_runner: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartNginx]:
    """start_nginx(port, *addresses): proxies listen on `port` of those addresses. `added` goes into its settings, and
    `changed` names what stands there and what is to stand there instead."""
    with ExitStack() as stack:

        def start(port: int, *addresses: str, added: str = "", changed: Mapping[str, str] | None = None) -> Nginx:
            names = NameServer(*addresses or ["127.0.0.1"])
            stack.callback(names.close)
            made = Nginx(nginx_runner, tmp_path_factory.mktemp("nginx"), port, names, added, changed or {})
            stack.callback(made.stop)
            return made.start()

        yield start


@pytest.fixture(scope="module")
def module_recorder() -> Iterator[FakeUpstream]:
    """A scripted backend in place of the proxy. It records what nginx sends."""
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def module_bare(start_nginx: StartNginx, module_recorder: FakeUpstream) -> Nginx:
    return wait_for_addresses(start_nginx(module_recorder.port))


@pytest.fixture
def recorder(module_recorder: FakeUpstream) -> FakeUpstream:
    module_recorder.talks.clear()
    return module_recorder


@pytest.fixture
def bare(module_bare: Nginx, recorder: FakeUpstream) -> Nginx:
    """nginx in front of `recorder`."""
    return module_bare


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeUpstream]:
    """A scripted vLLM behind the proxies."""
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def proxy(engine: FakeUpstream, start_proxy: Callable[..., Proxy]) -> Proxy:
    made = start_proxy("--vllm", engine.url, env=NO_CANARIES)
    made.wait_ready()
    return made


@pytest.fixture(scope="module")
def stack(start_nginx: StartNginx, proxy: Proxy) -> Nginx:
    """nginx, a real proxy and `engine`."""
    return wait_ready(start_nginx(proxy.port))
