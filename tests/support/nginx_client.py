"""What the nginx tests send through nginx, and what they wait for."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.fake_upstream import FakeUpstream, Talk, delta
from tests.support.nginx import Nginx
from tests.support.real_servers import Server
from tests.support.waiting import wait_until

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "a secret question"}]}
CONTENT = json.dumps(BODY).encode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


def wait_for_addresses(nginx: Nginx) -> Nginx:
    """Until nginx knows the proxies' addresses; it answers 502 before. For scripted proxies, which have no /ready."""
    with nginx.client() as client:
        wait_until(lambda: client.get("/health").status_code != 502, 20, "nginx to find the proxies' addresses")
    return nginx


def wait_ready(nginx: Nginx) -> Nginx:
    """Until a real proxy is ready behind nginx."""
    with nginx.client() as client:
        wait_until(lambda: client.get("/ready").status_code == 200, 20, "a proxy to be ready behind nginx")
    return nginx


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(CHAT, json={**BODY, **fields})


def send_raw(nginx: Nginx, data: bytes) -> bytes:
    """Send bytes over TLS. Returns what comes back until nginx closes or has been silent for 15 s."""
    with nginx.connect() as connection:
        connection.sendall(data)
        connection.settimeout(15)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except (OSError, ssl.SSLError):
            pass
        return received


def in_flight(proxy: Server) -> int:
    """Requests that the proxy has at its backends."""
    backends = httpx.get(proxy.url + "/models/status").json()["backends"]
    return sum(replica["in_flight"] for backend in backends for replica in backend["replicas"])


async def wait_for_event(event: threading.Event, seconds: float = 60) -> None:
    """For a backend's script: wait until the test sets the event."""
    assert await asyncio.to_thread(event.wait, seconds), f"the test did not set the event in {seconds:g} s"


@contextmanager
def releasing(*events: threading.Event) -> Iterator[None]:
    """Set the events at the end, also when the test fails, so that no script waits on."""
    try:
        yield
    finally:
        for event in events:
            event.set()


@contextmanager
def endless_response(engine: FakeUpstream, stream: bool) -> Iterator[threading.Event]:
    """The engine's next response never ends (stream) or never starts. The event is set when the proxy disconnects."""
    left = threading.Event()

    async def script(talk: Talk) -> None:
        if stream:
            await talk.start_stream()
            await talk.event(delta("hello"))
        await talk.until_client_leaves()
        left.set()

    engine.scripts.append(script)
    talks = len(engine.talks)
    yield left
    assert len(engine.talks) == talks + 1
