"""A real vLLM whose KV cache holds three requests, asked for six at a time through a proxy with the memory guard."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
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


def pressure(proxy: Proxy) -> dict[str, Any]:
    """Of vLLM, as the status shows it."""
    backends = httpx.get(f"{proxy.url}/models/status").json()["backends"]
    [memory] = [each["replicas"][0]["memory"] for each in backends if each["name"] == "vllm"]
    return memory["pressure"] or {"level": "normal", "reason": ""}


def test_no_request_is_lost_and_preemptions_stop(
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

    levels, halfway = set(), 0.0
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        while wait(clients, timeout=0.3).not_done:
            levels.add(pressure(proxy)["level"])
            if not halfway and backends.total() >= CLIENTS * ROUNDS / 2:
                halfway = preemptions(small_vllm)
        for each in clients:
            each.result()
    late = preemptions(small_vllm) - halfway
    print(f"\npreemptions: {halfway} in the first half, {late} in the second; answers by {dict(backends)}; {levels}")
    assert backends.total() == CLIENTS * ROUNDS
    assert halfway, "the cache was too large for this test"
    assert late <= halfway
    assert levels & {"reduced", "closed"}

    wait_until(lambda: pressure(proxy)["level"] == "normal", 60, "the pressure to end")
    page = httpx.get(f"{proxy.url}/metrics").text
    assert re.search(r'^xgen_replica_memory_pressure\{backend="vllm",[^}]*\} 0\.0$', page, re.M)
    results = re.findall(r'^xgen_memory_relief_total\{[^}]*result="(\w+)"\} [1-9]', page, re.M)
    assert set(results) <= {"done", "refused"}  # none if memory was enough again before the last answer
    path = DIALECTS["vllm"].relief_paths["reset_prefix_cache"]
    assert httpx.post(f"{small_vllm.url}{path}").json() == {"success": True}
    log = proxy.log.read_text()
    assert re.search(r"takes less work: memory: KV cache \d+% used, \d+ requests preempted", log)
    assert "takes as much work as before" in log
