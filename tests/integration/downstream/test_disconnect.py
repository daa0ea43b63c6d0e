"""A client may leave at any moment, or stop reading: what was done for it stops, and everything is given back."""

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
from tests.support.running_proxy import CHAT, RunningProxy, ask, backend, chat, get, wait_until
from xgen_proxy.downstream import http_protocol
from xgen_proxy.downstream.request_body import WATCH_AFTER_S, CancelOnDisconnect
from xgen_proxy.errors import ClientDisconnectedError

Start = Callable[..., RunningProxy]


def held(proxy: RunningProxy) -> int:
    waiting = len(proxy.gateway.admission.queue)
    return waiting + sum(replica.in_flight for replica in proxy.gateway.fleet.replicas)


def left(proxy: RunningProxy) -> bool:
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
    "in a whole answer": (half_whole, {"stream": False}),
    "before a whole answer": (silent, {"stream": False}),
    "in an error": (half_error, {}),
}


@pytest.mark.parametrize(("script", "fields"), MOMENTS.values(), ids=MOMENTS.keys())
@pytest.mark.parametrize("tries", [1, 2])
def test_leaving(
    start: Start, gpu: FakeUpstream, cpu: FakeUpstream, script: Script, fields: dict[str, Any], tries: int
) -> None:
    """In the first try, and in a second one, which tenacity drives."""
    gone = threading.Event()

    async def noting(talk: Talk) -> None:
        try:
            await script(talk)
        finally:
            gone.set()

    proxy = start(backends={"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu")})
    last = [gpu, cpu][tries - 1]
    if tries == 2:
        gpu.scripts.append(status(500))
    last.scripts.append(noting)
    with ask(proxy, **fields):
        wait_until(lambda: last.talks)
        wait_until(lambda: held(proxy) == 1)
    assert gone.wait(5), "the backend was not told to stop"
    wait_until(lambda: held(proxy) == 0, seconds=5)
    wait_until(lambda: left(proxy))
    assert chat(proxy).status_code == 200


def test_leaving_the_queue(start: Start, gpu: FakeUpstream) -> None:
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


def test_leaving_while_the_connection_is_made(start: Start, gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, connect_timeout_s=60)})
    [replica] = proxy.gateway.fleet.replicas
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        queued = [socket.socket() for _ in range(3)]  # fill the kernel's own queue: it drops what else comes
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


def test_leaving_the_moment_the_answer_ends(start: Start, gpu: FakeUpstream) -> None:
    """Whichever comes first: nothing is left, and the next one is served."""
    proxy = start(backends={"vllm": backend(gpu)})
    for number in range(30):
        with ask(proxy, stream=bool(number % 2)) as client:
            if number % 3:
                client.recv(65536)
    wait_until(lambda: held(proxy) == 0)
    assert chat(proxy).status_code == 200


# a client that does not read


def test_a_client_that_does_not_read_holds_its_backend_back(start: Start, gpu: FakeUpstream) -> None:
    """Nothing of an answer is kept in the proxy's memory but what the sockets and two small buffers hold."""
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
        while time.monotonic() - stalled_since < 0.3:  # no byte has moved for so long
            if sent != before:
                stalled_since, before = time.monotonic(), sent
            time.sleep(0.01)
        assert sent < 40_000_000, "the proxy takes it all in"
        [replica] = proxy.gateway.fleet.replicas
        assert replica.in_flight == 1
        read = 0
        ending = b""
        while not ending.endswith(b"0\r\n\r\n"):  # and when it reads, all of it comes
            part = client.recv(1_000_000)
            assert part
            read += len(part)
            ending = (ending + part)[-100:]
    assert read > total * len(text)
    assert b"data: [DONE]" in ending


def test_leaving_without_having_read(start: Start, gpu: FakeUpstream) -> None:
    gone = threading.Event()

    async def endless(talk: Talk) -> None:
        await talk.start_stream()
        try:
            while True:
                await talk.event(delta("x" * 50_000))
        finally:
            gone.set()

    gpu.scripts.append(endless)
    proxy = start(backends={"vllm": backend(gpu)})
    with ask(proxy):
        [replica] = proxy.gateway.fleet.replicas
        wait_until(lambda: any(connection._paused for connection in list(replica.pool.live)))
    assert gone.wait(10)
    wait_until(lambda: held(proxy) == 0)
    assert chat(proxy).status_code == 200


def test_a_client_that_never_reads_is_gone(start: Start, gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its connection, but not its backend's slot."""
    monkeypatch.setattr(http_protocol, "STALL_S", 0.2)
    gone = threading.Event()

    async def endless(talk: Talk) -> None:
        await talk.start_stream()
        try:
            while True:
                await talk.event(delta("x" * 50_000))
        finally:
            gone.set()

    gpu.scripts.append(endless)
    proxy = start(backends={"vllm": backend(gpu)})
    with ask(proxy) as client:
        assert gone.wait(20)
        wait_until(lambda: held(proxy) == 0)
        ending = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1_000_000):
                ending = part[-10:]
        assert ending
        assert not ending.endswith(b"0\r\n\r\n"), "the answer looks whole"
    wait_until(lambda: left(proxy))


def test_a_huge_whole_answer(start: Start, gpu: FakeUpstream) -> None:
    size = 20_000_000

    async def huge(talk: Talk) -> None:
        await talk.answer(200, whole("x" * size))

    gpu.scripts.append(huge)
    proxy = start(backends={"vllm": backend(gpu)})
    answer = chat(proxy)
    assert len(answer.json()["choices"][0]["message"]["content"]) == size


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_never_ends_is_ended(start: Start, gpu: FakeUpstream, stream: bool) -> None:
    gone = threading.Event()

    async def endless(talk: Talk) -> None:
        await talk.start_stream()
        try:
            while True:
                await talk.event(delta("x"))
                await asyncio.sleep(0.01)
        finally:
            gone.set()

    gpu.default = endless
    proxy = start(backends={"only": backend(gpu, dialect="llama-server", total_timeout_s=0.3)})
    answer = chat(proxy, stream=stream)
    assert "took more than 0.3 s" in answer.text
    assert answer.status_code == (200 if stream else 504)
    assert gone.wait(10)
    wait_until(lambda: held(proxy) == 0)


# everything at once


def test_whatever_happens_nothing_is_left(start: Start, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """Clients that leave at any moment, backends that fail in every way, one that is killed and comes back."""
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


def test_leaving_with_another_request_waiting_behind(proxy: RunningProxy, gpu: FakeUpstream) -> None:
    """Pipelined: the one that runs is not the last that came."""
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
    wait_until(lambda: left(proxy))


# CancelWhenGone itself


class Receiving:
    """An ASGI receive() whose client leaves when the test says so."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for message in messages:
            self.queue.put_nowait(message)

    async def __call__(self) -> dict[str, Any]:
        return await self.queue.get()

    def drain(self) -> None:
        self.queue.put_nowait({"type": "http.disconnect"})


async def test_what_runs_is_cancelled_and_the_task_goes_on() -> None:
    receive = Receiving({"type": "http.request", "body": b"more", "more_body": False})
    asyncio.get_running_loop().call_later(0.01, receive.drain)
    cleaned: list[bool] = []

    async def work() -> None:
        with CancelOnDisconnect(receive):
            try:
                await asyncio.sleep(60)
            finally:
                cleaned.append(True)

    with pytest.raises(ClientDisconnectedError):
        await work()
    assert cleaned
    task = asyncio.current_task()
    assert task
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # is not cancelled once more


async def test_nothing_happens_where_the_client_stays() -> None:
    receive = Receiving()
    with CancelOnDisconnect(receive):
        await asyncio.sleep(0)
    receive.drain()
    await asyncio.sleep(0.01)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_an_error_inside_goes_out() -> None:
    with pytest.raises(ZeroDivisionError), CancelOnDisconnect(Receiving()):
        raise ZeroDivisionError


async def test_leaving_when_it_is_over_already() -> None:
    """The end of the answer and the departure in one turn of the loop: the answer was first."""
    receive = Receiving()
    with CancelOnDisconnect(receive):
        await asyncio.sleep(2 * WATCH_AFTER_S)  # it listens now
        receive.drain()
    await asyncio.sleep(0.01)


async def test_being_cancelled_from_outside_is_no_departure() -> None:
    async def work() -> None:
        with CancelOnDisconnect(Receiving()):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
