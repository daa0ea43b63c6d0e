"""A client that leaves frees its slot, at any moment and on every backend."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.e2e.door import NEVER_ENDING, Door, Json, chat
from tests.e2e.servers import until

ENDLESS = chat("Count to a thousand.", max_tokens=1500, **NEVER_ENDING)
FREED_S = 8  # on a machine that does other things too; the requests themselves would take several times as long


def is_busy(door: Door) -> bool:
    """Asked of the backend itself."""
    if door.kind == "llama_server":
        return any(slot["is_processing"] for slot in httpx.get(door.backend.url + "/slots").json())
    if door.kind == "vllm":
        page = httpx.get(door.backend.url + "/metrics", timeout=5).text
        return any(float(value) for value in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", page, re.M))
    try:  # llama-cpp-python tells nothing, but its list of models waits for a running request
        httpx.get(door.backend.url + "/v1/models", timeout=0.3)
    except httpx.ReadTimeout:
        return True
    return False


@contextmanager
def request_in_flight(door: Door, body: Json) -> Iterator[socket.socket]:
    """A raw connection, so that leaving is nothing but closing it."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", door.proxy.port), timeout=30) as connection:
        connection.sendall(head.encode() + content)
        yield connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_leaving_frees_the_slot(door: Door, stream: bool) -> None:
    until(lambda: not is_busy(door), 30, "an idle backend")
    with request_in_flight(door, {**ENDLESS, "stream": stream}) as connection:
        if stream:
            assert b"200 OK" in connection.recv(65536)
        until(lambda: is_busy(door), 30, "the request to reach the backend")
    until(lambda: not is_busy(door), FREED_S, "the slot to be free")
    door.assert_answers()


def test_leaving_at_once_is_harmless(door: Door) -> None:
    for stream in (False, True):
        with request_in_flight(door, {**ENDLESS, "stream": stream}):
            pass
    until(lambda: not is_busy(door), FREED_S, "the slots to be free")
    door.assert_answers()


def test_requests_that_wait_for_a_slot_can_leave_too(door: Door) -> None:
    """More than the llama.cpp servers have slots: all leave, and the next one is answered."""
    with ExitStack() as crowd:
        for number in range(6):
            crowd.enter_context(request_in_flight(door, {**ENDLESS, "stream": number % 2 == 0}))
        until(lambda: is_busy(door), 30, "a request to reach the backend")
    until(lambda: not is_busy(door), FREED_S, "the slots to be free")
    door.assert_answers()
