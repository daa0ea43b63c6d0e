"""SIGTERM: the proxy stops being ready, live streams finish, and the process exits with 0."""

from __future__ import annotations

import signal
from collections.abc import Callable

import httpx

from tests.support.proxied_backend import NEVER_ENDING, chat
from tests.support.real_servers import Proxy, Server
from tests.support.waiting import wait_until


def test_live_streams_finish(llama_server: Server, start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--llama-cpp", llama_server.url, "--engine", "llama-server")
    proxy.wait_ready()
    assert proxy.process
    body = chat("Count to a hundred.", max_tokens=40, stream=True, **NEVER_ENDING)
    with httpx.stream("POST", proxy.url + "/v1/chat/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        proxy.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"finish_reason":"length"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert proxy.process.wait(10) == 0


def test_streams_that_outlive_the_drain_time_are_cut(llama_server: Server, start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--llama-cpp", llama_server.url, "--engine", "llama-server", env={"XGEN_DRAIN_S": "1"})
    proxy.wait_ready()
    assert proxy.process
    body = chat("Count to a thousand.", max_tokens=1500, stream=True, **NEVER_ENDING)
    with httpx.stream("POST", proxy.url + "/v1/chat/completions", json=body, timeout=60) as answer:
        chunks = answer.iter_bytes()
        assert next(chunks)
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(10) == 0
    slots = llama_server.url + "/slots"
    wait_until(lambda: not any(slot["is_processing"] for slot in httpx.get(slots).json()), 3, "the slot to be free")
