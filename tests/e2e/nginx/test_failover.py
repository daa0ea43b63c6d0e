"""Proxies that restart, stop, die or become unreachable behind nginx."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.nginx.conftest import NO_CANARIES, StartNginx
from tests.support import real_servers
from tests.support.fake_upstream import FakeUpstream, Talk, whole
from tests.support.nginx import Nginx
from tests.support.nginx_client import (
    BODY,
    CHAT,
    endless_response,
    in_flight,
    post,
    releasing,
    wait_for_addresses,
    wait_for_event,
    wait_ready,
)
from tests.support.real_servers import Server, free_port
from tests.support.waiting import wait_until


@pytest.fixture
def start_proxy_on(engine: FakeUpstream, logs: Path) -> Iterator[Callable[[str, int], Server]]:
    """start_proxy_on(address, port): a ready proxy that listens there, in front of `engine`."""
    started: list[Server] = []

    def start(address: str, port: int) -> Server:
        log = logs / f"proxy-{address}-{port}-{len(started)}.log"
        env = {**NO_CANARIES, **{name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}}
        command = [*real_servers.proxy(log).command, "--host", address, "--vllm", engine.url]
        made = Server("the proxy", command, log, "/ready", 30, env, port=port, host=address)
        started.append(made)
        return made.start().wait_ready()

    yield start
    for each in started:
        each.stop()


def test_a_restarted_proxy_is_found_at_its_new_address(
    start_nginx: StartNginx, start_proxy_on: Callable[[str, int], Server]
) -> None:
    port = free_port()
    nginx = start_nginx(port, "127.0.0.2")  # before any proxy is there
    first = start_proxy_on("127.0.0.2", port)
    with nginx.client() as client:
        wait_until(lambda: post(client).status_code == 200, 20, "the first proxy")
        nginx.names.addresses = ["127.0.0.3"]
        first.kill9()
        start_proxy_on("127.0.0.3", port)
        wait_until(lambda: post(client).status_code == 200, 10, "the proxy on its new address")
        nginx.names.addresses = ["127.0.0.2", "127.0.0.3"]
        start_proxy_on("127.0.0.2", port)

        def both() -> bool:
            assert post(client).status_code == 200
            return {line["proxy"] for line in nginx.lines()[-40:]} >= {f"127.0.0.2:{port}", f"127.0.0.3:{port}"}

        wait_until(both, 10, "both proxies to be used")


def send_until(nginx: Nginx, stop: threading.Event) -> list[int]:
    """The statuses of one client that sends requests until it is stopped."""
    statuses = []
    with nginx.client() as client:
        while not stop.is_set():
            statuses.append(post(client, max_tokens=1).status_code)
    return statuses


def listens(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((server.host, server.port)) == 0


WAITING = 77  # max_tokens of the requests that wait


@pytest.mark.parametrize("how", ["killed", "stopped", "forgotten and killed"])
def test_unanswered_requests_survive_the_loss_of_a_proxy(
    start_nginx: StartNginx,
    start_proxy_on: Callable[[str, int], Server],
    engine: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """Waiting requests and new ones both survive, whether or not nginx still resolves the name to the lost proxy."""
    port = free_port()
    proxies = [start_proxy_on(address, port) for address in ("127.0.0.2", "127.0.0.3")]
    nginx = wait_ready(start_nginx(port, "127.0.0.2", "127.0.0.3"))
    release = threading.Event()

    async def wait_or_answer(talk: Talk) -> None:
        if talk.json["max_tokens"] == WAITING:
            await wait_for_event(release)
        await talk.answer(200, whole())

    monkeypatch.setattr(engine, "default", wait_or_answer)
    stop = threading.Event()
    with ThreadPoolExecutor(12) as pool, nginx.client() as client, releasing(release, stop):
        waiting = [pool.submit(post, client, max_tokens=WAITING) for _ in range(8)]
        wait_until(lambda: sum(in_flight(each) for each in proxies) == 8, 20, "8 requests to wait")
        assert 0 < in_flight(proxies[0]) < 8, "nginx chooses the less busy of two"
        moving = [pool.submit(send_until, nginx, stop) for _ in range(2)]
        if how == "stopped":
            assert proxies[0].process
            proxies[0].process.send_signal(signal.SIGTERM)
            wait_until(lambda: not listens(proxies[0]), 20, "the stopped proxy to accept no more connections")
        else:
            if "forgotten" in how:
                nginx.names.addresses = ["127.0.0.3"]
                wait_until(lambda: {line["proxy"] for line in nginx.lines()[-20:]} == {f"127.0.0.3:{port}"}, 20, how)
            proxies[0].kill9()
            wait_until(lambda: in_flight(proxies[1]) >= 8, 20, "the killed proxy's requests to be sent to the other")
        release.set()
        assert [each.result(30).status_code for each in waiting] == [200] * 8
        stop.set()
        assert {status for each in moving for status in each.result(30)} == {200}


@contextmanager
def unreachable(address: str, port: int) -> Iterator[None]:
    """Connections to this address hang, as to a container that is gone: the listener's backlog of one is full."""
    with socket.create_server((address, port), backlog=0), socket.create_connection((address, port), 20):
        yield


def is_tried(address: str, port: int) -> bool:
    """True while a connection to this address is being opened."""
    connections = psutil.net_connections("tcp4")
    return any(each.status == psutil.CONN_SYN_SENT and each.raddr == (address, port) for each in connections)


def test_a_request_survives_two_unreachable_proxies(start_nginx: StartNginx, recorder: FakeUpstream) -> None:
    """nginx chooses the first proxy and then the second; each leaves DNS while nginx is connecting to it."""
    first, second, port = "127.0.0.2", "127.0.0.3", recorder.port
    faster = {"valid=2s": "valid=1s", "proxy_connect_timeout 300ms": "proxy_connect_timeout 4s"}
    with unreachable(first, port), unreachable(second, port), ThreadPoolExecutor(1) as pool:
        nginx = start_nginx(port, first, changed=faster)
        alone = f"http://127.0.0.1:{nginx.plain}/health"  # port 80 does not retry
        wait_until(lambda: httpx.get(alone, timeout=20).status_code == 504, 60, "nginx to know the first one's address")
        with nginx.client() as client:
            answer = pool.submit(post, client)
            for tried, next_one in ((first, second), (second, "127.0.0.1")):
                wait_until(partial(is_tried, tried, port), 20, f"nginx to choose {tried}")
                nginx.names.addresses = [next_one]
            assert answer.result(30).status_code == 200
    assert [talk.path for talk in recorder.talks] == [CHAT]


def test_a_proxy_that_is_gone_costs_a_request_half_a_second(start_nginx: StartNginx, recorder: FakeUpstream) -> None:
    """Its address hangs: no connection is refused, and none is made. Half of all requests choose it first."""
    gone, port = "127.0.0.2", recorder.port
    with unreachable(gone, port):
        nginx = wait_for_addresses(start_nginx(port, "127.0.0.1", gone))
        with nginx.client() as client:
            assert {post(client).status_code for _ in range(20)} == {200}
        tried = [line for line in nginx.lines() if line["proxy"].startswith(f"{gone}:")]
    assert tried
    assert min(line["duration_s"] for line in tried) < 0.5, "the fastest, since a busy machine delays others"
    assert len(recorder.talks) == 20


class Dying:
    """In place of proxies, by default on every address of this machine: reads each request and closes without an
    answer."""

    def __init__(self, address: str = "", port: int = 0) -> None:
        self.server = socket.create_server((address, port))
        self.port: int = self.server.getsockname()[1]
        self.requests: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                with connection:
                    head = connection.recv(65536)
                    if CHAT.encode() in head:
                        self.requests.append(head)


def test_a_post_is_executed_three_times_at_worst(start_nginx: StartNginx) -> None:
    """Eight proxies, each of which dies of the request: nginx must not send it to all of them, thrice."""
    dying = Dying()
    with dying.server:
        nginx = start_nginx(dying.port, *(f"127.0.0.{number}" for number in range(1, 9)))
        with nginx.client() as client:
            wait_until(lambda: post(client).status_code == 502 and dying.requests, 20, "nginx to find the proxies")
            dying.requests.clear()
            assert post(client).status_code == 502
    assert len(dying.requests) == 3


def test_a_dying_proxy_that_is_idle_does_not_get_a_request_thrice(
    start_nginx: StartNginx, recorder: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other proxy has requests in flight, so nginx prefers the dying one each time it chooses."""
    dying, release = Dying("127.0.0.3", recorder.port), threading.Event()

    async def wait_or_answer(talk: Talk) -> None:
        if talk.body and talk.json.get("max_tokens") == WAITING:
            await wait_for_event(release)
        await talk.answer(200, whole())

    monkeypatch.setattr(recorder, "default", wait_or_answer)
    with dying.server, ThreadPoolExecutor(4) as pool:
        # alone at first: a request that came by way of the dying one is counted among the proxies_again
        nginx = wait_for_addresses(start_nginx(recorder.port, "127.0.0.1"))
        with nginx.client() as client, releasing(release):
            waiting = [pool.submit(post, client, max_tokens=WAITING) for _ in range(4)]
            wait_until(lambda: len(recorder.talks) == 4, 20, "four requests to wait at the live proxy")
            nginx.names.addresses = ["127.0.0.1", "127.0.0.3"]
            wait_until(lambda: post(client).status_code == 200 and dying.requests, 20, "nginx to find the dying proxy")
            dying.requests.clear()
            assert {post(client).status_code for _ in range(10)} == {200}
            assert len(dying.requests) >= 10, "each met the dying one first"
            release.set()
            assert {each.result(30).status_code for each in waiting} == {200}


def test_requests_survive_the_loss_of_most_proxies(start_nginx: StartNginx, recorder: FakeUpstream) -> None:
    """Seven of eight addresses are still in DNS, but nothing listens there."""
    nginx = wait_for_addresses(start_nginx(recorder.port, *(f"127.0.0.{number}" for number in range(1, 9))))
    with nginx.client() as client:
        assert {post(client).status_code for _ in range(20)} == {200}
    assert len(recorder.talks) == 20


def test_a_started_stream_is_not_retried(
    start_nginx: StartNginx, start_proxy_on: Callable[[str, int], Server], engine: FakeUpstream
) -> None:
    port = free_port()
    proxies = [start_proxy_on(address, port) for address in ("127.0.0.2", "127.0.0.3")]
    nginx = wait_ready(start_nginx(port, "127.0.0.2", "127.0.0.3"))
    talks = len(engine.talks)
    with nginx.client() as client, endless_response(engine, stream=True) as left:

        def read_and_kill() -> None:
            with client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer:
                for line in answer.iter_lines():
                    if "hello" in line:
                        next(each for each in proxies if in_flight(each)).kill9()

        with pytest.raises(httpx.TransportError):
            read_and_kill()
        assert left.wait(5)
    assert len(engine.talks) == talks + 1


def test_connections_to_the_proxy_are_reused(bare: Nginx, recorder: FakeUpstream) -> None:
    before = recorder.connections
    for _ in range(20):
        with bare.client() as client:
            assert post(client).status_code == 200
    assert recorder.connections - before <= 2, "at most one for each worker of nginx"
    assert len(recorder.talks) == 20
    assert not [talk for talk in recorder.talks if "connection" in talk.headers]
