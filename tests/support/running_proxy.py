"""The real proxy in a thread, and functions that send it requests."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from tests.support.fake_upstream import FakeUpstream
from tests.support.waiting import wait_until as wait_until
from xgen_proxy.app import create_app
from xgen_proxy.config.settings import Settings
from xgen_proxy.gateway import Gateway
from xgen_proxy.server import listen, server_for

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


# verify=False: else httpx loads all certificate authorities for each call (35 ms); no test here uses TLS
get = functools.partial(httpx.get, verify=False, timeout=20)
post = functools.partial(httpx.post, verify=False, timeout=20)


class RunningProxy:
    """The real app in a real uvicorn on a free port, in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self.gateway: Gateway = self.app.gateway
        sock = listen("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = server_for(self.app, settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def until_up(self, count: int) -> None:
        wait_until(lambda: sum(replica.up for replica in self.gateway.fleet.replicas) >= count)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def running_proxy(up: int | None = None, **values: Any) -> Iterator[RunningProxy]:
    """A proxy with these settings once `up` replicas (default: all) are up. Checks at the end that it holds nothing."""
    values.setdefault("scrape_interval_s", 0.05)
    values.setdefault(
        "memory_guard", {"enabled": True, "ram_reduce": 1, "ram_close": 1}
    )  # whatever this machine has left
    proxy = RunningProxy(Settings(**values))
    try:
        proxy.until_up(len(list(proxy.gateway.fleet.replicas)) if up is None else up)
        yield proxy
    finally:
        proxy.stop()
    assert_nothing_held(proxy)


def backend(*fakes: FakeUpstream, **values: Any) -> dict[str, Any]:
    """Settings of a scripted backend. A busy machine may delay connections beyond the default timeout of 2 s."""
    return {"urls": [fake.url for fake in fakes], "dialect": "vllm", "connect_timeout_s": 20, **values}


def assert_nothing_held(proxy: RunningProxy) -> None:
    """No slot, no queued request and no live connection is left."""
    gateway = proxy.gateway
    assert [replica.in_flight for replica in gateway.fleet.replicas if replica.in_flight] == []
    assert gateway.admission.queue == []
    assert [replica.name for replica in gateway.fleet.replicas if replica.pool.live] == []


def chat(proxy: RunningProxy, timeout: float = 20, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    return post(f"{proxy.url}/v1/chat/completions", json={**CHAT, **fields}, headers=headers, timeout=timeout)


def ask(proxy: RunningProxy, **fields: Any) -> socket.socket:
    """Send a complete streaming request. Returns the client's socket, unread."""
    body = json.dumps({**CHAT, "stream": True, **fields}).encode()
    client = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    return client


def text_of(answer: httpx.Response) -> str:
    """The text of a stream, which must be well-formed."""
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
