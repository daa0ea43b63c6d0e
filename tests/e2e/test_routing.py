"""vLLM as the GPU backend and llama-cpp-python as the CPU backend, both real, behind one proxy."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import pytest

from tests.support.proxied_backend import NEVER_ENDING, ProxiedBackend, chat
from tests.support.real_servers import Server
from tests.support.waiting import wait_until

LONG = "Name the colours of the rainbow. " * 20  # 120 words


@pytest.mark.parametrize(
    ("content", "fields", "backend", "reason"),
    [
        ("Hi", {}, "vllm", "default"),
        (LONG, {}, "vllm", "long_prompt"),
        ("Say one word.", {"max_tokens": 1100, "stop": ["a", "e", "o", "."]}, "vllm", "long_output"),
        ("Hi", {"urgency": "high"}, "vllm", "urgent"),
        ("Hi", {"urgency": "low"}, "vllm", "default"),
        ("Hi", {"backend": "llama_cpp"}, "llama_cpp", "explicit"),
        ("Hi", {"backend": "vllm"}, "vllm", "explicit"),
        ("Hi", {"backend": "auto"}, "vllm", "default"),
        (LONG, {"backend": "llama_cpp"}, "llama_cpp", "explicit"),
    ],
)
def test_rules(fleet: ProxiedBackend, content: str, fields: dict[str, Any], backend: str, reason: str) -> None:
    answer = fleet.chat(content, **{"max_tokens": 2, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Backend"] == backend
    assert answer.headers["X-Route-Reason"].startswith(reason)
    assert answer.headers["X-Attempts"] == "1"


def test_hints_as_headers(fleet: ProxiedBackend) -> None:
    answer = fleet.post("/v1/chat/completions", chat("Hi", max_tokens=1), headers={"X-Backend": "llama_cpp"})
    assert answer.headers["X-Backend"] == "llama_cpp"


def test_generate_is_routed_by_the_same_rules(fleet: ProxiedBackend) -> None:
    for backend in ("vllm", "llama_cpp"):
        answer = fleet.post("/generate", {"prompt": "Hi", "max_tokens": 2, "backend": backend})
        assert answer.json()["backend_used"] == backend


def test_dry_run_agrees_with_routing(fleet: ProxiedBackend) -> None:
    plan = fleet.post("/route", chat(LONG)).json()
    assert [candidate["backend"] for candidate in plan["candidates"]] == ["vllm", "llama_cpp"]
    assert plan["candidates"][0]["reason"].startswith("long_prompt")


def test_urgent_requests_avoid_a_loaded_gpu(fleet: ProxiedBackend) -> None:
    busy = chat("Count to a thousand.", max_tokens=1500, stream=True, backend="vllm", **NEVER_ENDING)
    with contextlib.ExitStack() as held:
        client = held.enter_context(httpx.Client(timeout=60))
        for _ in range(3):  # of four slots: load 0.75
            answer = held.enter_context(client.stream("POST", fleet.url + "/v1/chat/completions", json=busy))
            assert answer.headers["X-Backend"] == "vllm"
        assert fleet.post("/route", chat("Hi")).json()["candidates"][0]["load"] == 0.75
        urgent = fleet.chat("Hi", max_tokens=2, urgency="high")
        assert urgent.status_code == 200
        assert urgent.headers["X-Backend"] == "llama_cpp"
        assert urgent.headers["X-Route-Reason"].startswith("urgent")
        assert fleet.chat("Hi", max_tokens=2).headers["X-Backend"] == "vllm"
    wait_until(lambda: backend_of(fleet, urgency="high") == "vllm", 10, "the load to be gone")


def backend_of(fleet: ProxiedBackend, **fields: Any) -> str:
    """The backend that a request would go to now."""
    return str(fleet.post("/route", chat("Hi", **fields)).json()["candidates"][0]["backend"])


def test_requests_survive_a_kill_of_vllm_and_return_to_it(fleet: ProxiedBackend, vllm_server: Server) -> None:
    assert fleet.chat("Hi", max_tokens=1).headers["X-Backend"] == "vllm"
    running = chat("Count to a thousand.", max_tokens=100, stream=True, **NEVER_ENDING)
    try:
        with httpx.stream("POST", fleet.url + "/v1/chat/completions", json=running, timeout=60) as broken:
            lines = broken.iter_lines()
            assert next(lines).startswith("data: ")
            vllm_server.kill9()
            answer = fleet.chat(max_tokens=12)
            assert answer.status_code == 200, answer.text
            assert answer.headers["X-Backend"] == "llama_cpp"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "the CPU did not resume the stream"
        assert any(line.startswith(": resumed on llama_cpp@") for line in rest)
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"

        for content, fields in (("Hi", {"urgency": "high"}), (LONG, {}), ("Hi", {"backend": "vllm"})):
            answer = fleet.chat(content, max_tokens=1, **fields)
            assert answer.status_code == 200, answer.text
            assert answer.headers["X-Backend"] == "llama_cpp"
        assert fleet.get("/ready").status_code == 200
        refused = fleet.chat("Hi", backend="vllm", fallback="none")
        assert refused.status_code in (502, 503)
        assert refused.headers["x-should-retry"] == "false"
    finally:
        vllm_server.restart()
    wait_until(lambda: backend_of(fleet) == "vllm", 30, "routing to return to vLLM")
    answer = fleet.chat(max_tokens=2)
    assert (answer.status_code, answer.headers["X-Backend"]) == (200, "vllm")
