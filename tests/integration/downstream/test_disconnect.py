"""A client may disconnect at any moment, or stop reading: its work is cancelled and all that it held is released.

Without sockets: tests/unit/downstream/test_disconnect.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.fake_upstream import FakeUpstream, Script, Talk, delta, good, silent, status, whole
from tests.support.running_proxy import CHAT, RunningProxy, ask, backend, chat, get
from tests.support.waiting import wait_until
from xgen_proxy.downstream import http_protocol

Start = Callable[..., RunningProxy]


def held(proxy: RunningProxy) -> int:
    """Requests that hold a slot or wait for one."""
    waiting = len(proxy.gateway.admission.queue)
    return waiting + sum(replica.in_flight for replica in proxy.gateway.fleet.replicas)


def cancellation_counted(proxy: RunningProxy) -> bool:
    return "\nxgen_cancellations_total{" in get(f"{proxy.url}/metrics").text


async def headers_only(talk: Talk) -> None:
    await talk.start_stream()
    await talk.until_client_leaves()


async def midway(talk: Talk) -> None:
    await talk.start_stream()
    await talk.event(delta("hel"))
    await talk.until_client_leaves()


async def half_whole(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
    await talk.until_client_leaves()


async def half_error(talk: Talk) -> None:
    await talk.send(b"HTTP/1.1 500 X\r\ncontent-length: 1000\r\n\r\n{")
    await talk.until_client_leaves()


MOMENTS: dict[str, tuple[Script, dict[str, Any]]] = {
    "before the first byte": (silent, {}),
    "after the headers": (headers_only, {}),
    "in the stream": (midway, {}),
    "in a whole response": (half_whole, {"stream": False}),
    "before a whole response": (silent, {"stream": False}),
    "in an error": (half_error, {}),
}


@pytest.mark.parametrize(("script", "fields"), MOMENTS.values(), ids=MOMENTS.keys())
@pytest.mark.parametrize("tries", [1, 2])
def test_disconnect_cancels_the_request(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, script: Script, fields: dict[str, Any], tries: int
) -> None:
    """In the first attempt, and in a second one."""
    cancelled = threading.Event()

    async def watched(talk: Talk) -> None:
        try:
            await script(talk)
        finally:
            cancelled.set()

    proxy = start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")})
    last = [gpu, cpu][tries - 1]
    if tries == 2:
        gpu.scripts.append(status(500))
    last.scripts.append(watched)
    with ask(proxy, **fields):
        wait_until(lambda: last.talks)
        wait_until(lambda: held(proxy) == 1)
    assert cancelled.wait(5), "the request to the backend was not cancelled"
    wait_until(lambda: held(proxy) == 0, seconds=5)
    wait_until(lambda: cancellation_counted(proxy))
    assert chat(proxy).status_code == 200


def test_disconnect_in_the_queue(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"only": backend(gpu, dialect="openai", slots=1)})
    gpu.scripts.append(midway)
    with ask(proxy):
        wait_until(lambda: gpu.talks)
        with ask(proxy), ask(proxy):
            wait_until(lambda: len(proxy.gateway.admission.queue) == 2)
        wait_until(lambda: proxy.gateway.admission.queue == [])
        assert held(proxy) == 1
    wait_until(lambda: held(proxy) == 0)
    assert len(gpu.talks) == 1
    assert chat(proxy).status_code == 200


def test_disconnect_while_connecting_to_the_backend(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, connect_timeout_s=60)})
    [replica] = proxy.gateway.fleet.replicas
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        queued = [socket.socket() for _ in range(3)]  # fill the kernel's queue, so that it drops the next connection
        for each in queued:
            each.setblocking(False)
            each.connect_ex(deaf.getsockname())
        replica.pool.port = deaf.getsockname()[1]
        with ask(proxy):
            wait_until(lambda: held(proxy) == 1)
        wait_until(lambda: held(proxy) == 0)
        for each in queued:
            each.close()
    replica.pool.port = gpu.port
    assert chat(proxy).status_code == 200


def test_disconnect_at_the_moment_the_response_ends(start: Start, gpu: FakeUpstream) -> None:
    """Whichever comes first: nothing stays held, and the next request is served."""
    proxy = start(backends={"vllm": backend(gpu)})
    for number in range(30):
        with ask(proxy, stream=bool(number % 2)) as client:
            if number % 3:
                client.recv(65536)
    wait_until(lambda: held(proxy) == 0)
    assert chat(proxy).status_code == 200


# a client that reads slowly or not at all


def test_slow_client_slows_its_backend_down(start: Start, gpu: FakeUpstream) -> None:
    """The proxy keeps no more of a response in memory than the sockets and two small buffers hold."""
    sent = 0
    total = 2000
    text = "x" * 50_000

    async def plenty(talk: Talk) -> None:
        nonlocal sent
        await talk.start_stream()
        for _ in range(total):
            await talk.event(delta(text))
            sent += len(text)
        await talk.event(delta(finish="stop"))
        await talk.end()

    gpu.scripts.append(plenty)
    proxy = start(backends={"vllm": backend(gpu, idle_timeout_s=60)})
    with ask(proxy) as client:
        wait_until(lambda: sent > 0)
        stalled_since, before = time.monotonic(), sent
        while time.monotonic() - stalled_since < 0.3:  # until no byte has moved for this long
            if sent != before:
                stalled_since, before = time.monotonic(), sent
            time.sleep(0.01)
        assert sent < 40_000_000, "the proxy buffers the whole response"
        [replica] = proxy.gateway.fleet.replicas
        assert replica.in_flight == 1
        read = 0
        ending = b""
        while not ending.endswith(b"0\r\n\r\n"):  # once the client reads, all of it arrives
            part = client.recv(1_000_000)
            assert part
            read += len(part)
            ending = (ending + part)[-100:]
    assert read > total * len(text)
    assert b"data: [DONE]" in ending


def endless(cancelled: threading.Event, *, size: int = 50_000, pause_s: float = 0) -> Script:
    """A stream of chunks of `size` characters. It sets `cancelled` when the proxy cancels it."""

    async def script(talk: Talk) -> None:
        await talk.start_stream()
        try:
            while True:
                await talk.event(delta("x" * size))
                await asyncio.sleep(pause_s)
        finally:
            cancelled.set()

    return script


def test_disconnect_of_a_client_that_reads_nothing(start: Start, gpu: FakeUpstream) -> None:
    cancelled = threading.Event()

    gpu.scripts.append(endless(cancelled))
    proxy = start(backends={"vllm": backend(gpu)})
    with ask(proxy):
        [replica] = proxy.gateway.fleet.replicas
        wait_until(lambda: any(connection.paused for connection in list(replica.pool.live)))
    assert cancelled.wait(10)
    wait_until(lambda: held(proxy) == 0)
    assert chat(proxy).status_code == 200


def test_client_that_never_reads_loses_its_slot(
    start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is aborted, so that the response does not look complete."""
    monkeypatch.setattr(http_protocol, "STALL_TIMEOUT_S", 0.2)
    cancelled = threading.Event()

    gpu.scripts.append(endless(cancelled))
    proxy = start(backends={"vllm": backend(gpu)})
    with ask(proxy) as client:
        assert cancelled.wait(20)
        wait_until(lambda: held(proxy) == 0)
        ending = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1_000_000):
                ending = part[-10:]
        assert ending
        assert not ending.endswith(b"0\r\n\r\n"), "the response looks complete"
    wait_until(lambda: cancellation_counted(proxy))


def test_client_that_reads_steadily_gets_all(start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes several times STALL_TIMEOUT_S, but never reads nothing for so long."""
    monkeypatch.setattr(http_protocol, "STALL_TIMEOUT_S", 0.4)
    size = 40_000_000  # more than the kernel's buffers, which the proxy fills at once

    async def huge(talk: Talk) -> None:
        await talk.answer(200, whole("x" * size))

    gpu.scripts.append(huge)
    proxy = start(backends={"vllm": backend(gpu)})
    began = time.monotonic()
    with ask(proxy, stream=False) as client:
        read = 0
        while read < size:
            part = client.recv(1_000_000)
            assert part, f"cut after {read} bytes"
            read += len(part)
            time.sleep(len(part) / 20_000_000)
    assert time.monotonic() - began > 3 * http_protocol.STALL_TIMEOUT_S


def test_client_that_reads_steadily_but_for_ever_is_cut(
    start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "STALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(http_protocol, "MAX_STALLS", 3)
    size = 40_000_000

    async def huge(talk: Talk) -> None:
        await talk.answer(200, whole("x" * size))

    gpu.scripts.append(huge)
    proxy = start(backends={"vllm": backend(gpu)})
    read = 0
    with ask(proxy, stream=False) as client, contextlib.suppress(ConnectionResetError):
        while part := client.recv(100_000):
            read += len(part)
            time.sleep(0.01)
    assert read < size


def test_huge_whole_response(start: Start, gpu: FakeUpstream) -> None:
    size = 20_000_000

    async def huge(talk: Talk) -> None:
        await talk.answer(200, whole("x" * size))

    gpu.scripts.append(huge)
    proxy = start(backends={"vllm": backend(gpu)})
    answer = chat(proxy)
    assert len(answer.json()["choices"][0]["message"]["content"]) == size


@pytest.mark.parametrize("stream", [True, False])
def test_endless_response_is_cut_at_total_timeout(start: Start, gpu: FakeUpstream, stream: bool) -> None:
    cancelled = threading.Event()

    gpu.default = endless(cancelled, size=1, pause_s=0.01)
    proxy = start(backends={"only": backend(gpu, dialect="llama-server", total_timeout_s=0.3)})
    answer = chat(proxy, stream=stream)
    assert "took more than 0.3 s" in answer.text
    assert answer.status_code == (200 if stream else 504)
    assert cancelled.wait(10)
    wait_until(lambda: held(proxy) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_flow_until_their_time_is_over_open_no_breaker(
    start: Start, gpu: FakeUpstream, stream: bool
) -> None:
    """A client that reads slowly, or asks for endless answers, would take the replica from all others."""
    gpu.default = endless(threading.Event(), size=1, pause_s=0.01)
    proxy = start(backends={"only": backend(gpu, dialect="llama-server", total_timeout_s=0.3)}, canary_interval_s=0)
    for _ in range(4):  # three failures open it
        assert "took more than 0.3 s" in chat(proxy, stream=stream).text
    (replica,) = proxy.gateway.fleet.replicas
    assert (replica.breaker.failures, replica.state) == (0, "up")


@pytest.mark.parametrize("script", [silent, headers_only, half_whole], ids=lambda script: script.__name__)
def test_silence_until_the_time_is_over_is_the_replicas_fault(start: Start, gpu: FakeUpstream, script: Script) -> None:
    gpu.scripts.append(script)
    proxy = start(backends={"only": backend(gpu, total_timeout_s=0.3)}, canary_interval_s=0)
    assert chat(proxy, stream=script is headers_only).status_code == 504
    (replica,) = proxy.gateway.fleet.replicas
    assert replica.breaker.failures == 1


# everything at once


def test_nothing_stays_held_after_a_storm(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """Clients disconnect at any moment, backends fail in every way, and one is killed and restarted."""
    rng = random.Random(11)

    async def slow(talk: Talk) -> None:
        if not talk.json.get("stream"):
            await good(talk)
            return
        await talk.start_stream()
        for word in ("hel", "lo"):
            await asyncio.sleep(rng.random() / 50)
            await talk.event(delta(word))
        await talk.event(delta(finish="stop"))
        await talk.end()

    async def reset(talk: Talk) -> None:
        talk.reset()

    async def mixed(talk: Talk) -> None:
        script = rng.choice([good, good, good, slow, slow, reset, status(500), status(429), status(400)])
        await script(talk)

    gpu.default = cpu.default = mixed
    backends = {
        "vllm": backend(gpu, slots=4, dialect="openai"),
        "llama_cpp": backend(cpu, device_class="cpu", dialect="openai", slots=2),
    }
    proxy = start(backends=backends, limits={"queue_timeout_s": 0.5, "queue": 8})
    seen: list[int] = []

    def client(number: int) -> None:
        own = random.Random(number)
        for _ in range(12):
            stream = own.random() < 0.6
            try:
                seen.append(chat(proxy, stream=stream, timeout=own.choice([0.005, 0.02, 20])).status_code)
            except httpx.HTTPError:
                seen.append(499)

    threads = [threading.Thread(target=client, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    gpu.kill()
    wait_until(lambda: len(seen) > 40, seconds=30)
    gpu.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 144
    assert set(seen) <= {200, 400, 429, 499, 502, 503}
    assert 200 in seen
    wait_until(lambda: held(proxy) == 0, seconds=5)


def test_disconnect_with_a_pipelined_request(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    """The request that runs is not the last one received."""
    gpu.scripts.append(midway)
    client = ask(proxy)
    try:
        assert client.recv(65536)
        body = json.dumps(CHAT).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        client.sendall(head + body)
    finally:
        client.close()
    wait_until(lambda: held(proxy) == 0, seconds=5)
    wait_until(lambda: cancellation_counted(proxy))
