"""A real vLLM whose KV cache holds five requests, asked for ten at a time, without and with the memory guard."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import from_make, running
from tests.support import real_servers as servers
from tests.support.real_servers import Proxy, Server
from tests.support.unavailable import unavailable
from tests.support.waiting import wait_until

CLIENTS = 10
ROUNDS = 4
TOKENS = 100
SMALL = ["--max-model-len", "256", "--block-size", "16", "--num-gpu-blocks-override", "36"]


@pytest.fixture(scope="module")
def small_vllm(logs: Path) -> Iterator[Server]:
    if not os.environ.get("XGEN_TEST_VLLM"):
        unavailable("NOT TESTED AGAINST vLLM: XGEN_TEST_VLLM is not set, `make test` sets it where vLLM installs")
    model = from_make("XGEN_TEST_VLLM_MODEL", "the model directory for vLLM")
    server = servers.vllm(logs / "small-vllm.log", os.environ["XGEN_TEST_VLLM"], model, tools=False)
    server.command += SMALL
    server.env["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    yield from running(server)


def preemptions(vllm: Server) -> float:
    found = re.search(r"^vllm:num_preemptions_total\{[^}]*\} (\S+)", httpx.get(f"{vllm.url}/metrics").text, re.M)
    assert found
    return float(found[1])


def pressure(proxy: Proxy) -> dict[str, Any]:
    """Of vLLM, as the status shows it."""
    backends = httpx.get(f"{proxy.url}/models/status").json()["backends"]
    [memory] = [each["replicas"][0]["memory"] for each in backends if each["name"] == "vllm"]
    return memory["pressure"] or {"level": "normal", "reason": ""}


@dataclass
class Run:
    """`preempted`: in the first half of the answers, when no guard can call back what already runs, and in the second.
    `levels`: of the pressure, as seen meanwhile. `backends`: of the answers."""

    preempted: tuple[float, float]
    levels: set[str]
    backends: Counter[str]


def drive(proxy: Proxy, vllm: Server) -> Run:
    """Each client asks again as soon as it has its answer. One request in three may go to the CPU."""
    before, backends = preemptions(vllm), Counter[str]()

    def client(number: int) -> None:
        with httpx.Client(timeout=120) as session:
            for turn in range(ROUNDS):
                hints = {} if (number + turn) % 3 == 0 else {"backend": "vllm"}
                prompt = f"Story {number} of day {turn}: once upon a time"
                asked = {"model": servers.MODEL, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, **hints}
                answer = session.post(f"{proxy.url}/v1/completions", json=asked)
                assert answer.status_code == 200, answer.text
                assert answer.json()["usage"]["completion_tokens"] == TOKENS
                backends[answer.headers["x-backend"]] += 1

    levels: set[str] = set()
    halfway = 0.0
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        while wait(clients, timeout=0.3).not_done:
            levels.add(pressure(proxy)["level"])
            if not halfway and backends.total() >= CLIENTS * ROUNDS / 2:
                halfway = preemptions(vllm)
        for each in clients:
            each.result()
    return Run((halfway - before, preemptions(vllm) - halfway), levels, backends)


def test_no_request_is_lost_and_preemptions_stop(
    small_vllm: Server, llama_server: Server, start_proxy: Callable[..., Proxy]
) -> None:
    flags = ["--vllm", small_vllm.url, "--llama-cpp", llama_server.url, "--engine", "llama-server"]
    quick = {"XGEN_SCRAPE_INTERVAL_S": "0.3"}
    unguarded = start_proxy(*flags, env={**quick, "XGEN_MEMORY_GUARD__ENABLED": "false"})
    unguarded.wait_ready()
    without = drive(unguarded, small_vllm)
    assert without.levels == {"normal"}

    guarded = start_proxy(*flags, env={**quick, "XGEN_MEMORY_GUARD__RELIEF": "reset_prefix_cache"})
    guarded.wait_ready()
    with_guard = drive(guarded, small_vllm)
    print(f"\npreemptions in both halves: {without.preempted} without, {with_guard.preempted} with the guard")
    print(f"answered by {dict(without.backends)} without, {dict(with_guard.backends)} with the guard")
    assert with_guard.preempted[1] < without.preempted[1] / 2
    assert with_guard.backends.total() == CLIENTS * ROUNDS
    assert with_guard.backends["llama_cpp"], "short work spills"
    assert with_guard.levels & {"reduced", "closed"}

    wait_until(lambda: pressure(guarded)["level"] == "normal", 60, "the pressure to end")
    page = httpx.get(f"{guarded.url}/metrics").text
    assert re.search(r'^xgen_replica_memory_pressure\{backend="vllm",[^}]*\} 0\.0$', page, re.M)
    assert re.search(r'^xgen_memory_relief_total\{[^}]*result="done"\} [1-9]', page, re.M)
    log = guarded.log.read_text()
    assert re.search(r"takes less work: memory: KV cache \d+% used, \d+ requests preempted", log)
    assert "takes as much work as before" in log
