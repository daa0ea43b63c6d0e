"""Replicas that come and go: lookups are repeated, new replicas answer a canary first, removed ones drain."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import dns.asyncresolver
import dns.message
import dns.rrset
import pytest

from tests.support.fake_upstream import FakeUpstream, Talk, status, whole
from tests.support.running_proxy import RunningProxy, backend, chat, get
from tests.support.server_process import Streaming
from tests.support.waiting import wait_until
from xgen_proxy.fleet import circuit_breaker, discovery
from xgen_proxy.fleet.backend import Backend
from xgen_proxy.fleet.replica import Replica

Start = Callable[..., RunningProxy]
Found = list[tuple[Any, ...]]


class Names:
    """A host name with the addresses that the test sets, or with an error that getaddrinfo() raises."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.error: OSError | None = None
        self.lookups = 0

    def getaddrinfo(self, host: str, port: int, *_: Any, **__: Any) -> Found:
        assert host == "engine.test"
        self.lookups += 1
        if self.error:
            raise self.error
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in self.addresses
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    found = Names()
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host == "engine.test":
            return found.getaddrinfo(host, port)
        return real(host, port, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(discovery, "LOOKUP_INTERVAL_S", 0.05)
    return found


@pytest.fixture
def second(gpu: FakeUpstream) -> Iterator[FakeUpstream]:
    """Another server at the same port of another address."""
    fake = FakeUpstream(host="127.0.0.2", port=gpu.port)
    yield fake
    fake.close()


def named(gpu: FakeUpstream, **values: Any) -> dict[str, Any]:
    return {**backend(gpu, **values), "urls": [f"dns://engine.test:{gpu.port}"]}


def fleet(proxy: RunningProxy) -> Backend:
    return proxy.gateway.fleet.backends[0]


def at(proxy: RunningProxy, address: str) -> Replica | None:
    return next((each for each in fleet(proxy).replicas if each.pool.host == address), None)


def test_each_address_of_a_name_is_a_replica(
    start: Start, names: Names, gpu: FakeUpstream, second: FakeUpstream
) -> None:
    names.addresses = ["127.0.0.1", "127.0.0.2"]
    proxy = start(backends={"vllm": named(gpu)}, up=2)
    assert [each.name for each in fleet(proxy).replicas] == [f"vllm@127.0.0.{n}:{gpu.port}" for n in (1, 2)]
    assert not any(fake.talks for fake in (gpu, second)), "replicas that are there from the start get no canary"
    assert all(each.open_slots == each.slots for each in fleet(proxy).replicas)


def test_new_replica_answers_a_canary_then_starts_slowly(
    start: Start, names: Names, gpu: FakeUpstream, second: FakeUpstream
) -> None:
    names.addresses = ["127.0.0.1"]
    proxy = start(backends={"vllm": named(gpu, slots=20)}, up=1)
    asked, answer = threading.Event(), threading.Event()

    async def slow(talk: Talk) -> None:
        asked.set()
        await asyncio.to_thread(answer.wait, 20)
        await talk.answer(200, whole("1", finish="length"))

    second.scripts.append(slow)
    names.addresses.append("127.0.0.2")
    assert asked.wait(10)
    new = at(proxy, "127.0.0.2")
    assert new is not None
    assert (new.state, new.reason) == ("suspect", "new: must answer a canary first")
    answer.set()
    wait_until(lambda: new.up)
    assert [talk.json["max_tokens"] for talk in second.talks] == [1]
    assert new.open_slots < new.slots
    wait_until(lambda: chat(proxy).headers["x-replica"] == new.name)


def test_new_replica_that_fails_its_canary_gets_no_requests(
    start: Start, names: Names, gpu: FakeUpstream, second: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker, "OPEN_S", 0.05)
    names.addresses = ["127.0.0.1"]
    proxy = start(backends={"vllm": named(gpu)}, up=1)
    second.default = status(500)
    names.addresses.append("127.0.0.2")
    wait_until(lambda: len(second.talks) >= 2)
    assert {chat(proxy).headers["x-replica"] for _ in range(6)} == {f"vllm@127.0.0.1:{gpu.port}"}
    assert {talk.json["max_tokens"] for talk in second.talks} == {1}


def test_removed_replica_finishes_its_stream_and_is_forgotten(
    start: Start, names: Names, gpu: FakeUpstream, second: FakeUpstream
) -> None:
    names.addresses = ["127.0.0.2"]
    proxy = start(backends={"vllm": named(gpu)}, up=1)
    removed = at(proxy, "127.0.0.2")
    assert removed is not None
    second.scripts.append(status(500))
    assert chat(proxy).status_code == 502
    streaming = Streaming(second)
    streaming.start(proxy.url)
    names.addresses = ["127.0.0.1"]
    wait_until(lambda: at(proxy, "127.0.0.1") and not at(proxy, "127.0.0.2"))
    wait_until(lambda: at(proxy, "127.0.0.1").up)  # type: ignore[union-attr]
    assert removed.state == "draining"
    assert chat(proxy).headers["x-replica"] == f"vllm@127.0.0.1:{gpu.port}"
    assert removed.name in get(f"{proxy.url}/metrics").text
    streaming.release.set()
    streaming.thread.join(20)
    assert streaming.text.endswith("data: [DONE]\n\n")
    wait_until(lambda: not fleet(proxy).draining)
    assert removed.name not in get(f"{proxy.url}/metrics").text
    wait_until(lambda: not removed.pool.live)


def test_draining_replica_that_is_listed_again_is_kept(start: Start, names: Names, gpu: FakeUpstream) -> None:
    names.addresses = ["127.0.0.1"]
    proxy = start(backends={"vllm": named(gpu)}, up=1)
    before = at(proxy, "127.0.0.1")
    streaming = Streaming(gpu)
    streaming.start(proxy.url)
    names.addresses = []
    wait_until(lambda: not fleet(proxy).replicas)
    assert chat(proxy).status_code == 503
    names.addresses = ["127.0.0.1"]
    wait_until(lambda: at(proxy, "127.0.0.1"))
    assert at(proxy, "127.0.0.1") is before
    assert before is not None
    wait_until(lambda: before.up)
    assert before.in_flight == 1
    streaming.release.set()
    streaming.thread.join(20)
    wait_until(lambda: before.in_flight == 0)
    assert before.up


def test_name_that_does_not_exist_yet(start: Start, names: Names, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": named(gpu, models={"m": "m"})}, up=0)
    assert get(f"{proxy.url}/ready").status_code == 503
    answer = chat(proxy)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    names.addresses = ["127.0.0.1"]
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 200)
    assert chat(proxy).status_code == 200


def test_a_lookup_that_fails_once_is_asked_again(
    start: Start, gpu: FakeUpstream, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    names.addresses = ["127.0.0.1"]
    failures = [socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")]
    lookup = names.getaddrinfo

    def fails_once(host: str, port: int) -> Found:
        if failures:
            raise failures.pop()
        return lookup(host, port)

    names.getaddrinfo = fails_once  # type: ignore[method-assign]
    start(backends={"vllm": named(gpu)}, up=1)
    assert "cannot be looked up" not in caplog.text


def test_replicas_are_kept_while_no_name_server_answers(
    start: Start, names: Names, gpu: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    names.addresses = ["127.0.0.1"]
    proxy = start(backends={"vllm": named(gpu)}, up=1)
    names.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    before = names.lookups
    wait_until(lambda: names.lookups > before + 3)
    assert chat(proxy).status_code == 200
    assert caplog.text.count("cannot be looked up") == 1, "logged once, not every two seconds"


def test_slow_lookup_delays_no_other_backend(
    start: Start, names: Names, gpu: FakeUpstream, second: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.addresses = ["127.0.0.1"]
    slow = {"urls": ["dns://slow.test:8000"], "dialect": "vllm", "models": {"m": "m"}}
    asked, proceed, found = threading.Event(), threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **named: Any) -> Any:
        if host == "slow.test":
            if names.lookups > 2:
                asked.set()
                proceed.wait(20)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    proxy = start(backends={"slow": slow, "vllm": named(gpu)}, up=1)
    assert asked.wait(10)
    names.addresses.append("127.0.0.2")
    wait_until(lambda: len(proxy.gateway.fleet.backends[1].replicas) == 2, 3)
    proceed.set()


async def test_pod_with_addresses_of_both_families_is_one_replica(names: Names) -> None:
    names.addresses = ["10.0.0.1", "fd00::1"]
    assert await discovery.resolve(["dns://engine.test:8000"]) == ["http://10.0.0.1:8000"]
    names.addresses = ["fd00::1"]
    assert await discovery.resolve(["dns://engine.test:8000"]) == ["http://[fd00::1]:8000"]


class NameServer(asyncio.DatagramProtocol):
    """Answers SRV queries on a real socket with `records` ("priority weight port target"), or NXDOMAIN without any."""

    def __init__(self) -> None:
        self.records: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        if self.records:
            answer.answer.append(dns.rrset.from_text(question.question[0].name, 5, "IN", "SRV", *self.records))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(), address)


async def test_each_srv_record_is_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(NameServer, local_addr=("127.0.0.1", 0))
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], transport.get_extra_info("sockname")[1]
    monkeypatch.setattr(dns.asyncresolver, "default_resolver", resolver)
    assert await discovery.resolve(["srv://_http._tcp.vllm.test"]) == []
    server.records = ["0 0 8000 vllm-0.vllm.test.", "0 0 8001 vllm-1.vllm.test."]
    assert sorted(await discovery.resolve(["srv://_http._tcp.vllm.test", "http://a:1"])) == [
        "http://a:1", "http://vllm-0.vllm.test:8000", "http://vllm-1.vllm.test:8001",
    ]  # fmt: skip
    transport.close()
