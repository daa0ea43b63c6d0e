"""A real vLLM whose KV cache holds three requests, asked for six at a time through a proxy with the memory guard."""

from __future__ import annotations

import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import real_servers as servers
from tests.support.real_servers import Proxy, Server
from tests.support.waiting import wait_until
from xgen_proxy.dialects.registry import DIALECTS

CLIENTS = 6
ROUNDS = 3
TOKENS = 60
# 9 blocks of 32 tokens: a request of 12 + 60 tokens needs 3. vLLM on a CPU has no smaller blocks than 32.
SMALL = ["--max-model-len", "256", "--block-size", "32", "--num-gpu-blocks-override", "9"]


@pytest.fixture(scope="module")
def small_vllm(logs: Path, vllm_program: str, vllm_model: str) -> Iterator[Server]:
    server = servers.vllm(logs / "small-vllm.log", vllm_program, vllm_model, tools=False)
    server.command += SMALL
    server.env["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    with servers.running(server) as server:
        yield server


def preemptions(vllm: Server) -> float:
    found = re.search(r"^vllm:num_preemptions_total\{[^}]*\} (\S+)", httpx.get(f"{vllm.url}/metrics").text, re.M)
    assert found
    return float(found[1])


def replica(proxy: Proxy) -> Any:
    """vLLM, as the status shows it."""
    backends = httpx.get(f"{proxy.url}/models/status").json()["backends"]
    [found] = [each["replicas"][0] for each in backends if each["name"] == "vllm"]
    return found


def pressure(proxy: Proxy) -> Any:
    return replica(proxy)["memory"]["pressure"] or {"level": "normal", "reason": "", "limit": None}


@dataclass
class Sample:
    """`limit`: requests that vLLM may hold; None: all."""

    in_flight: int
    limit: int | None


def sample(proxy: Proxy) -> Sample:
    found = replica(proxy)
    return Sample(found["in_flight"], (found["memory"]["pressure"] or {}).get("limit"))


def check_held_back(samples: list[Sample]) -> None:
    """Over its limit vLLM gets nothing new; and it was at its limit while clients wanted more."""
    for before, after in pairwise(samples):
        if before.limit is not None and before.limit == after.limit:
            assert after.in_flight <= max(before.in_flight, before.limit), (before, after)
    assert any(each.limit is not None and each.in_flight <= each.limit < CLIENTS for each in samples), samples


def relief(proxy: Proxy) -> set[str]:
    """The results of the times that vLLM was asked to free memory."""
    page = httpx.get(f"{proxy.url}/metrics").text
    return set(re.findall(r'^xgen_memory_relief_total\{[^}]*result="(\w+)"\} [1-9]', page, re.M))


def leave_while_memory_is_short(proxy: Proxy) -> None:
    """Ask for long answers and leave before they end, so that vLLM is idle before its pressure is over: the one moment
    at which it is asked for relief."""
    asked = {"model": servers.MODEL, "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "backend": "vllm"}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with ExitStack() as stack:
        for _ in range(CLIENTS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port)))
            client.sendall(head + body)
        wait_until(lambda: pressure(proxy)["level"] != "normal", 120, "memory to be short")


def test_no_request_is_lost_while_the_guard_holds_back_and_relieves(
    small_vllm: Server, llama_server: Server, start_proxy: Callable[..., Proxy]
) -> None:
    env = {
        "XGEN_SCRAPE_INTERVAL_S": "0.3",
        "XGEN_MEMORY_GUARD__ENABLED": "true",
        "XGEN_MEMORY_GUARD__RELIEF": "reset_prefix_cache",
    }
    proxy = start_proxy("--vllm", small_vllm.url, "--llama-cpp", llama_server.url, "--engine", "llama-server", env=env)
    proxy.wait_ready()
    backends = Counter[str]()

    def client(number: int) -> None:
        """Asks again as soon as it has its answer. One answer in three may come from the CPU."""
        with httpx.Client(timeout=180) as session:
            for turn in range(ROUNDS):
                hints = {} if (number + turn) % 3 == 0 else {"backend": "vllm"}
                prompt = f"Story {number} of day {turn}: once upon a time"
                asked = {"model": servers.MODEL, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, **hints}
                answer = session.post(f"{proxy.url}/v1/completions", json=asked)
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] == TOKENS
                backends[answer.headers["x-backend"]] += 1

    levels, samples, before = set(), [], preemptions(small_vllm)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        while wait(clients, timeout=0.3).not_done:
            levels.add(pressure(proxy)["level"])
            if backends.total() < CLIENTS * (ROUNDS - 1):
                samples.append(sample(proxy))
        for each in clients:
            each.result()
    preempted = preemptions(small_vllm) - before
    print(f"\n{preempted} preemptions; answers by {dict(backends)}; {levels}")
    assert backends.total() == CLIENTS * ROUNDS
    assert preempted, "the cache was too large for this test"
    assert preempted <= backends["vllm"], "a storm: each request loses its cache more than once"
    assert levels & {"reduced", "closed"}
    check_held_back(samples)

    leave_while_memory_is_short(proxy)
    assert wait_until(lambda: relief(proxy), 10, "the relief of an idle vLLM") <= {"done", "refused"}
    wait_until(lambda: pressure(proxy)["level"] == "normal", 60, "the pressure to end")
    page = httpx.get(f"{proxy.url}/metrics").text
    assert re.search(r'^xgen_replica_memory_pressure\{backend="vllm",[^}]*\} 0\.0$', page, re.M)
    path = DIALECTS["vllm"].relief_paths["reset_prefix_cache"]
    assert httpx.post(f"{small_vllm.url}{path}").json() == {"success": True}
    log = proxy.log.read_text()
    assert re.search(r"takes less work: memory: KV cache \d+% used, \d+ requests preempted", log)
    assert "takes as much work as before" in log
