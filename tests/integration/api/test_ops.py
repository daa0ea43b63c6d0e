"""/health /ready /metrics /models/status /route: their shapes, and what they say when things go wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_upstream import FakeUpstream, Talk, good
from tests.support.running_proxy import (
    CHAT,
    RunningProxy,
    backend,
    chat,
    get,
    post,
    running_proxy,
    wait_until,
)
from xgen_proxy.downstream.api_keys import hash_key


@pytest.fixture(scope="module")
def fakes() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    gpu, cpu = FakeUpstream(running=3, waiting=1, kv=0.25), FakeUpstream()
    yield gpu, cpu
    gpu.close()
    cpu.close()


@pytest.fixture(scope="module")
def proxy(fakes: tuple[FakeUpstream, FakeUpstream]) -> Iterator[RunningProxy]:
    gpu, cpu = fakes
    backends = {
        "vllm": backend(gpu, models={"big": "m"}, slots=8),
        "llama_cpp": backend(cpu, device_class="cpu", models={"big": "m", "small": "m"}, tools=False),
    }
    with running_proxy(backends=backends, default_model="small") as running:
        yield running


def plan(proxy: RunningProxy, **fields: object) -> dict[str, Any]:
    answer = post(f"{proxy.url}/route", json={**CHAT, "model": "big", **fields})
    assert answer.status_code == 200
    told: dict[str, Any] = answer.json()
    return told


def test_health_is_of_the_proxy_alone(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kill()
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 503)
    answer = get(f"{proxy.url}/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_ready_while_a_model_can_answer(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    assert get(f"{proxy.url}/ready").json() == {"status": "ready"}
    gpu.kill()
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 503)
    told = get(f"{proxy.url}/ready").json()
    assert told["reason"] == "no backend is up"
    assert told["replicas"][f"vllm@127.0.0.1:{gpu.port}"].startswith("down: ")
    gpu.start()
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 200)
    proxy.gateway.draining = True
    answer = get(f"{proxy.url}/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
    assert chat(proxy).status_code == 200  # who is there already is served


def test_status(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    gpu, _ = fakes
    told = get(f"{proxy.url}/models/status").json()
    backends = told.pop("backends")
    assert told == {"default_model": "small", "models": ["small", "big"], "queued": 0, "draining": False}
    cpu_told, gpu_told = backends
    assert [each["name"] for each in backends] == ["llama_cpp", "vllm"]
    assert (gpu_told["device_class"], gpu_told["dialect"], gpu_told["models"]) == ("gpu", "vllm", {"big": "m"})
    assert (gpu_told["context"], cpu_told["models"]) == (2048, {"big": "m", "small": "m"})
    assert "tools" in gpu_told["capabilities"]
    assert "tools" not in cpu_told["capabilities"]
    [replica] = gpu_told["replicas"]
    load = replica.pop("load")
    memory = replica.pop("memory")
    since = replica.pop("for_s")
    assert replica == {
        "name": f"vllm@127.0.0.1:{gpu.port}", "url": gpu.url, "state": "up", "reason": "healthy", "up": True,
        "in_flight": 0, "slots": 8, "connections": 0,
    }  # fmt: skip
    assert since >= 0
    assert 0 <= load.pop("age_s") < 5
    assert load == {"total": 0.5, "in_flight": 4, "slots": 8, "waiting": 1, "kv": 0.25, "stale": False}
    assert memory.pop("process_rss_bytes") > 1_000_000  # the fake lives in this very process
    assert memory == {"model_file_bytes": None, "kv_usage": 0.25}


def test_status_of_the_moment(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    go_on = threading.Event()

    async def slow(talk: Talk) -> None:
        await asyncio.to_thread(go_on.wait, 10)
        await good(talk)

    gpu.default = slow
    proxy = start(backends={"only": backend(gpu, dialect="openai", slots=1)})
    threads = [threading.Thread(target=chat, args=[proxy]) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: get(f"{proxy.url}/models/status").json()["queued"] == 2)
    [told] = get(f"{proxy.url}/models/status").json()["backends"]
    [replica] = told["replicas"]
    assert (replica["in_flight"], replica["connections"], replica["load"]["total"]) == (1, 1, 1.0)
    page = metrics(proxy)
    assert page["xgen_queue_requests"] == {(): 2}
    assert page["xgen_replica_in_flight"] == {("only", f"only@127.0.0.1:{gpu.port}"): 1}
    go_on.set()
    for thread in threads:
        thread.join()
    assert get(f"{proxy.url}/models/status").json()["queued"] == 0


def metrics(proxy: RunningProxy) -> dict[str, dict[tuple[str, ...], float]]:
    """name → {label values, sorted by label name: value}"""
    answer = get(f"{proxy.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_the_fleet_in_metrics(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    page = metrics(proxy)
    gpu = ("vllm", f"vllm@127.0.0.1:{fakes[0].port}")
    assert page["xgen_replica_up"][gpu] == 1
    assert page["xgen_replica_slots"][gpu] == 8
    assert page["xgen_replica_load"][gpu] == 0.5
    assert page["xgen_queue_requests"] == {(): 0}


# the dry run


def test_a_plan(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    told = plan(proxy, urgency="high", max_tokens=7)
    first, second = told["candidates"]
    assert first == {
        "backend": "vllm", "replica": f"vllm@127.0.0.1:{fakes[0].port}", "device_class": "gpu", "load": 0.5, "tier": 0,
        "reason": "urgent: GPU load 0.50 < 0.7",
    }  # fmt: skip
    assert second["backend"] == "llama_cpp"
    assert (told["rejections"], told["error"]) == ([], None)
    assert told["features"]["model"] == "big"
    assert told["features"]["max_tokens"] == 7
    assert fakes[0].talks == []


def test_hints_in_headers(proxy: RunningProxy) -> None:
    told = post(f"{proxy.url}/route", json={**CHAT, "model": "big"}, headers={"x-backend": "llama_cpp"}).json()
    assert [each["backend"] for each in told["candidates"]] == ["llama_cpp", "vllm"]
    assert told["features"]["backend"] == "llama_cpp"


def test_a_completion(proxy: RunningProxy) -> None:
    told = post(f"{proxy.url}/route", json={"prompt": "a b c"}).json()
    assert (told["features"]["endpoint"], told["features"]["prompt_words"]) == ("completions", 3)
    assert told["features"]["model"] == "small"


def test_who_was_passed_over_and_why(proxy: RunningProxy) -> None:
    told = plan(proxy, tools=[{"type": "function", "function": {"name": "f"}}])
    assert [each["backend"] for each in told["candidates"]] == ["vllm"]
    assert told["rejections"] == [{"name": "llama_cpp", "reason": "cannot do tools"}]


def test_a_request_that_nobody_can_do(proxy: RunningProxy) -> None:
    told = plan(proxy, model="small", tools=[{"type": "function", "function": {"name": "f"}}])
    assert told["candidates"] == []
    assert told["error"]["status"] == 400
    assert "llama_cpp cannot do tools" in told["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [({"model": "none"}, 404, "does not exist"), ({"messages": []}, 400, "messages"), ({"urgency": "x"}, 400, "high")],
)
def test_what_would_be_refused_is(proxy: RunningProxy, fields: dict[str, object], status: int, words: str) -> None:
    answer = post(f"{proxy.url}/route", json={**CHAT, "model": "big", **fields})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


# keys


def test_what_needs_a_key(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash_key("sk-mine")])
    generating = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate", "/generate/stream")
    for path in (*generating, "/route"):
        for headers in ({}, {"authorization": "Bearer sk-other"}):
            answer = post(proxy.url + path, json=CHAT, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["x-should-retry"] == "false"
    assert gpu.talks == []
    for path in ("/v1/models", "/v1/models/m"):
        assert (answer := get(proxy.url + path)).status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/ready", "/metrics", "/models/status"):
        assert get(proxy.url + path).status_code == 200, path
    with_key = {"authorization": "Bearer sk-mine"}
    assert get(f"{proxy.url}/v1/models/m", headers=with_key).status_code == 200
    assert chat(proxy, headers=with_key).status_code == 200
    assert post(f"{proxy.url}/route", json=CHAT, headers=with_key).status_code == 200


def test_a_key_is_asked_for_before_the_body_is_read(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash_key("sk-mine")])
    with httpx.Client(verify=False) as client:
        answer = client.post(f"{proxy.url}/v1/chat/completions", content=b"{not json")
    assert answer.status_code == 401


def test_a_backends_key_is_sent_to_it_alone(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, api_key="hush")})
    assert chat(proxy, headers={"authorization": "Bearer mine"}).status_code == 200
    assert gpu.talks[0].headers["authorization"] == "Bearer hush"
    pages = [get(proxy.url + path).text for path in ("/models/status", "/metrics", "/ready")]
    assert "hush" not in json.dumps(pages)
