"""Replicas that come and go: lookups are repeated, new replicas answer a canary first, removed ones drain."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype
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


class NameServer(asyncio.DatagramProtocol):
    """A name server on a real socket, in a thread. `records`: by name and type, as text; other names do not exist.

    A name in `failing` gets SERVFAIL, one in `hanging` no answer.
    """

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.failing: set[str] = set()
        self.hanging: set[str] = set()
        self.lookups: list[str] = []
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        work = self.loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        transport, _ = asyncio.run_coroutine_threadsafe(work, self.loop).result(10)
        self.port = transport.get_extra_info("sockname")[1]

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        question = dns.message.from_wire(data)
        name, kind = question.question[0].name, dns.rdatatype.to_text(question.question[0].rdtype)
        host = name.to_text(omit_final_dot=True)
        self.lookups.append(host)
        if host in self.hanging:
            return
        answer = dns.message.make_response(question)
        found = self.records.get((host, kind))
        if host in self.failing:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif found:
            answer.answer.append(dns.rrset.from_text(name, 5, "IN", kind, *found))
        elif not any(each == host for each, _ in self.records):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(max_size=65535), address)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)

    @property
    def addresses(self) -> list[str]:
        """Of engine.test."""
        return self.records.setdefault(("engine.test", "A"), [])

    @addresses.setter
    def addresses(self, found: list[str]) -> None:
        self.records["engine.test", "A"] = found


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], server.port
    monkeypatch.setattr(dns.asyncresolver, "default_resolver", resolver)
    monkeypatch.setattr(discovery, "LOOKUP_INTERVAL_S", 0.05)
    yield server
    server.close()


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
    start: Start, names: NameServer, gpu: FakeUpstream, second: FakeUpstream
) -> None:
    names.addresses = ["127.0.0.1", "127.0.0.2"]
    proxy = start(backends={"vllm": named(gpu)}, up=2)
    assert [each.name for each in fleet(proxy).replicas] == [f"vllm@127.0.0.{n}:{gpu.port}" for n in (1, 2)]
    assert not any(fake.talks for fake in (gpu, second)), "replicas that are there from the start get no canary"
    assert all(each.open_slots == each.slots for each in fleet(proxy).replicas)


def test_new_replica_answers_a_canary_then_starts_slowly(
    start: Start, names: NameServer, gpu: FakeUpstream, second: FakeUpstream
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
    start: Start, names: NameServer, gpu: FakeUpstream, second: FakeUpstream, monkeypatch: pytest.MonkeyPatch
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
    start: Start, names: NameServer, gpu: FakeUpstream, second: FakeUpstream
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


def test_draining_replica_that_is_listed_again_is_kept(start: Start, names: NameServer, gpu: FakeUpstream) -> None:
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


def test_name_that_does_not_exist_yet(start: Start, names: NameServer, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": named(gpu, models={"m": "m"})}, up=0)
    assert get(f"{proxy.url}/ready").status_code == 503
    answer = chat(proxy)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    names.addresses = ["127.0.0.1"]
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 200)
    assert chat(proxy).status_code == 200


def test_replicas_are_kept_while_no_name_server_answers(
    start: Start, names: NameServer, gpu: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    names.addresses = ["127.0.0.1"]
    proxy = start(backends={"vllm": named(gpu)}, up=1)
    names.failing.add("engine.test")
    wait_until(lambda: "cannot be looked up" in caplog.text)
    before = len(names.lookups)
    wait_until(lambda: len(names.lookups) > before + 6)
    assert chat(proxy).status_code == 200
    assert caplog.text.count("cannot be looked up") == 1, "logged once, not every two seconds"
    names.failing.clear()
    names.addresses = []
    wait_until(lambda: not fleet(proxy).replicas)


async def test_a_lookup_that_fails_once_is_asked_again(names: NameServer) -> None:
    names.addresses = ["127.0.0.1"]
    names.failing.add("engine.test")
    lookup = asyncio.create_task(discovery.resolve("dns://engine.test:1"))
    while not names.lookups:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    names.failing.clear()
    assert await lookup == ["http://127.0.0.1:1"]


def test_names_that_hang_delay_no_other_backend_and_no_exit(
    start: Start, names: NameServer, gpu: FakeUpstream, second: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a thread for each lookup, a few of them would use up all threads and hold up the end of the process."""
    monkeypatch.setattr(discovery, "LOOKUP_TIMEOUT_S", 1.0)
    names.addresses = ["127.0.0.1"]
    hosts = [f"slow{number}.test" for number in range(20)]
    names.hanging.update(hosts)
    slow = {
        host.partition(".")[0]: {"urls": [f"dns://{host}:8000"], "dialect": "vllm", "models": {"m": "m"}}
        for host in hosts
    }
    threads = threading.active_count()
    proxy = start(backends={**slow, "vllm": named(gpu)}, up=1)
    assert threading.active_count() <= threads + 2, "the proxy's own and one of its server"
    names.addresses = ["127.0.0.1", "127.0.0.2"]
    wait_until(lambda: len(proxy.gateway.fleet.backends_by_name["vllm"].replicas) == 2, 3)
    before = time.monotonic()
    proxy.stop()
    assert time.monotonic() - before < 3


async def test_a_lookup_has_a_limit(names: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names.hanging.add("engine.test")
    monkeypatch.setattr(discovery, "LOOKUP_TIMEOUT_S", 0.3)
    with pytest.raises(dns.exception.DNSException):
        await asyncio.wait_for(discovery.resolve("dns://engine.test:1"), 5)


def test_addresses_of_a_name_have_a_limit(
    start: Start,
    names: NameServer,
    gpu: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(discovery, "MAX_ADDRESSES", 2)
    names.addresses = ["127.0.0.4", "127.0.0.1", "127.0.0.3", "127.0.0.2"]
    proxy = start(backends={"vllm": named(gpu)}, up=1)
    before = len(names.lookups)
    wait_until(lambda: len(names.lookups) > before + 3)
    assert [each.pool.host for each in fleet(proxy).replicas] == ["127.0.0.1", "127.0.0.2"]
    assert caplog.text.count("has 4 addresses; only 2 of them are used") == 1


async def test_addresses_and_the_hosts_file_need_no_name_server(
    names: NameServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_bytes(b"# 10.0.0.9 engine.test\n10.0.0.1 other Engine.test # a comment\n::1 engine.test\n\xff\n")
    monkeypatch.setattr(discovery, "HOSTS_FILE", hosts)
    assert await discovery.resolve("dns://engine.test:1") == ["http://10.0.0.1:1"]
    assert await discovery.resolve("dns://10.0.0.2:1") == ["http://10.0.0.2:1"]
    assert await discovery.resolve("dns://[fd00::1]:1") == ["http://[fd00::1]:1"]
    monkeypatch.setattr(discovery, "HOSTS_FILE", tmp_path / "none")
    assert await discovery.resolve("dns://engine.test:1") == []


async def test_pod_with_addresses_of_both_families_is_one_replica(names: NameServer) -> None:
    names.addresses = ["10.0.0.1"]
    names.records["engine.test", "AAAA"] = ["fd00::1"]
    assert await discovery.resolve("dns://engine.test:8000") == ["http://10.0.0.1:8000"]
    names.addresses = []
    assert await discovery.resolve("dns://engine.test:8000") == ["http://[fd00::1]:8000"]


async def test_each_srv_record_is_a_replica(names: NameServer) -> None:
    assert await discovery.resolve("srv://_http._tcp.vllm.test") == []
    names.records["_http._tcp.vllm.test", "SRV"] = ["0 0 8000 vllm-0.vllm.test.", "0 0 8001 vllm-1.vllm.test."]
    assert sorted(await discovery.resolve("srv://_http._tcp.vllm.test")) == [
        "http://vllm-0.vllm.test:8000",
        "http://vllm-1.vllm.test:8001",
    ]
    assert await discovery.resolve("http://a:1") == ["http://a:1"]
