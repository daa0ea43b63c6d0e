"""A client that disconnects frees its slot, at any time and on every backend."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.support.proxied_backend import NEVER_ENDING, Json, ProxiedBackend, chat
from tests.support.waiting import wait_until

ENDLESS = chat("Count to a thousand.", max_tokens=1500, **NEVER_ENDING)
# Seconds on a busy machine. vLLM's gauges follow its engine's steps, and may not change for seconds after an abort. The
# abandoned requests themselves would take minutes.
FREED_S = {"llama_cpp_python": 8, "llama_server": 8, "vllm": 30}


def is_busy(proxied: ProxiedBackend) -> bool:
    """True while the backend itself reports a running request."""
    if proxied.kind == "llama_server":
        return any(slot["is_processing"] for slot in httpx.get(proxied.backend.url + "/slots").json())
    if proxied.kind == "vllm":
        page = httpx.get(proxied.backend.url + "/metrics", timeout=5).text
        return any(float(value) for value in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", page, re.M))
    try:  # llama-cpp-python reports nothing, but its list of models waits for a running request
        httpx.get(proxied.backend.url + "/v1/models", timeout=0.3)
    except httpx.ReadTimeout:
        return True
    return False


def wait_until_free(proxied: ProxiedBackend) -> None:
    """Wait until first the proxy and then the backend report no request."""
    wait_until(lambda: in_flight(proxied) == 0, 3, "the proxy to count the request out")
    wait_until(lambda: not is_busy(proxied), FREED_S[proxied.kind], "the slot to be free")


def in_flight(proxied: ProxiedBackend) -> int:
    backends = proxied.get("/models/status").json()["backends"]
    return sum(replica["in_flight"] for backend in backends for replica in backend["replicas"])


@contextmanager
def request_in_flight(proxied: ProxiedBackend, body: Json) -> Iterator[socket.socket]:
    """A request on a raw connection, which is closed at the end without reading."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxied.proxy.port), timeout=30) as connection:
        connection.sendall(head.encode() + content)
        yield connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_disconnects_free_the_slot(proxied: ProxiedBackend, stream: bool) -> None:
    wait_until(lambda: not is_busy(proxied), 30, "an idle backend")
    with request_in_flight(proxied, {**ENDLESS, "stream": stream}) as connection:
        if stream:
            assert b"200 OK" in connection.recv(65536)
        wait_until(lambda: is_busy(proxied), 30, "the request to reach the backend")
    wait_until_free(proxied)
    proxied.assert_answers()


def test_immediate_disconnects_are_harmless(proxied: ProxiedBackend) -> None:
    for stream in (False, True):
        with request_in_flight(proxied, {**ENDLESS, "stream": stream}):
            pass
    wait_until_free(proxied)
    proxied.assert_answers()


def test_queued_requests_can_disconnect(proxied: ProxiedBackend) -> None:
    """More requests than the llama.cpp servers have slots all disconnect, and the next one is answered."""
    with ExitStack() as crowd:
        for number in range(6):
            crowd.enter_context(request_in_flight(proxied, {**ENDLESS, "stream": number % 2 == 0}))
        wait_until(lambda: is_busy(proxied), 30, "a request to reach the backend")
    wait_until_free(proxied)
    proxied.assert_answers()
