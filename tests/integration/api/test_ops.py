"""/health /ready /metrics /models/status /route: what they return, also when things go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_upstream import FakeUpstream, Talk, good
from tests.support.gguf_bytes import gguf, key_value
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
from xgen_proxy.api import ops
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.dialects.backend_request import ModelFacts


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
    found: dict[str, Any] = answer.json()
    return found


def test_health_ignores_the_backends(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    gpu.kill()
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 503)
    answer = get(f"{proxy.url}/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_ready_while_a_replica_is_up(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)})
    assert get(f"{proxy.url}/ready").json() == {"status": "ready"}
    gpu.kill()
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 503)
    found = get(f"{proxy.url}/ready").json()
    assert found["reason"] == "no backend is up"
    assert found["replicas"][f"vllm@127.0.0.1:{gpu.port}"].startswith("down: ")
    gpu.start()
    wait_until(lambda: get(f"{proxy.url}/ready").status_code == 200)
    proxy.gateway.draining = True
    answer = get(f"{proxy.url}/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
    assert chat(proxy).status_code == 200  # a connection that is open is still served


def test_status_of_the_fleet(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    gpu, _ = fakes
    found = get(f"{proxy.url}/models/status").json()
    backends = found.pop("backends")
    del found["gpus"], found["model_pairs"]  # of this machine; tested in test_tokenizers
    models = {"default_model": "small", "models": ["small", "big"], "aliases": {}}
    assert found == {**models, "queued": 0, "draining": False}
    cpu_status, gpu_status = backends
    assert [each["name"] for each in backends] == ["llama_cpp", "vllm"]
    assert (gpu_status["device_class"], gpu_status["dialect"], gpu_status["models"]) == ("gpu", "vllm", {"big": "m"})
    assert (gpu_status["context"], cpu_status["models"]) == (2048, {"big": "m", "small": "m"})
    assert "tools" in gpu_status["capabilities"]
    assert "tools" not in cpu_status["capabilities"]
    [replica] = gpu_status["replicas"]
    load = replica.pop("load")
    memory = replica.pop("memory")
    assert replica.pop("kv_cache")["preemptions"] == 0
    since = replica.pop("for_s")
    assert replica == {
        "name": f"vllm@127.0.0.1:{gpu.port}", "url": gpu.url, "state": "up", "reason": "healthy", "up": True,
        "in_flight": 0, "slots": 8, "connections": 0, "model": None,
    }  # fmt: skip
    assert since >= 0
    assert 0 <= load.pop("age_s") < 5
    assert load == {"total": 0.5, "in_flight": 4, "slots": 8, "waiting": 1, "kv": 0.25, "stale": False}
    assert memory.pop("process_rss_bytes") > 1_000_000  # the fake lives in this very process
    assert memory == {"model_file_bytes": None, "kv_usage": 0.25, "pressure": None}


def test_status_tells_the_model_from_its_file(
    start: Callable[..., RunningProxy], gpu: FakeUpstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The header of the file that the engine's process has mapped fills in what the engine does not report."""
    model = tmp_path / "model.gguf"
    model.write_bytes(gguf(key_value("llama.block_count", 4, struct.pack("<I", 30))))
    monkeypatch.setattr(ops, "model_files", lambda pid: [model] if pid == os.getpid() else [])
    [found] = get(f"{start(backends={'only': backend(gpu)}).url}/models/status").json()["backends"]
    [replica] = found["replicas"]
    assert {key: value for key, value in replica["model"].items() if value is not None} == {"layers": 30}


def test_what_an_engine_reports_goes_before_its_file() -> None:
    reported = ModelFacts(vocabulary=10, parameters=7, quantization="Q4_1")
    assert ops.model_status(reported, ModelFacts(vocabulary=9, layers=30)) == {
        "vocabulary": 10, "context": None, "layers": 30, "width": None, "parameters": 7, "bytes": None,
        "quantization": "Q4_1",
    }  # fmt: skip
    assert ops.model_status(None, None) is None


def test_status_follows_the_load(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
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
    [found] = get(f"{proxy.url}/models/status").json()["backends"]
    [replica] = found["replicas"]
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


def test_metrics_of_the_fleet(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    page = metrics(proxy)
    gpu = ("vllm", f"vllm@127.0.0.1:{fakes[0].port}")
    assert page["xgen_replica_up"][gpu] == 1
    assert page["xgen_replica_slots"][gpu] == 8
    assert page["xgen_replica_load"][gpu] == 0.5
    assert page["xgen_queue_requests"] == {(): 0}


# the dry run


def test_route_explains_the_plan(proxy: RunningProxy, fakes: tuple[FakeUpstream, FakeUpstream]) -> None:
    found = plan(proxy, urgency="high", max_tokens=7)
    first, second = found["candidates"]
    assert first == {
        "backend": "vllm", "replica": f"vllm@127.0.0.1:{fakes[0].port}", "device_class": "gpu", "load": 0.5, "tier": 0,
        "memory": None, "reason": "urgent: GPU load 0.50 < 0.7",
    }  # fmt: skip
    assert second["backend"] == "llama_cpp"
    assert (found["rejections"], found["error"]) == ([], None)
    assert found["features"]["model"] == "big"
    assert found["features"]["max_tokens"] == 7
    assert fakes[0].talks == []


def test_route_reads_hints_from_headers(proxy: RunningProxy) -> None:
    found = post(f"{proxy.url}/route", json={**CHAT, "model": "big"}, headers={"x-backend": "llama_cpp"}).json()
    assert [each["backend"] for each in found["candidates"]] == ["llama_cpp", "vllm"]
    assert found["features"]["backend"] == "llama_cpp"


def test_route_takes_a_completion(proxy: RunningProxy) -> None:
    found = post(f"{proxy.url}/route", json={"prompt": "a b c"}).json()
    assert (found["features"]["endpoint"], found["features"]["prompt_words"]) == ("completions", 3)
    assert found["features"]["model"] == "small"


def test_route_lists_rejections(proxy: RunningProxy) -> None:
    found = plan(proxy, tools=[{"type": "function", "function": {"name": "f"}}])
    assert [each["backend"] for each in found["candidates"]] == ["vllm"]
    assert found["rejections"] == [{"name": "llama_cpp", "reason": "cannot do tools"}]


def test_route_explains_an_error(proxy: RunningProxy) -> None:
    found = plan(proxy, model="small", tools=[{"type": "function", "function": {"name": "f"}}])
    assert found["candidates"] == []
    assert found["error"]["status"] == 400
    assert "llama_cpp cannot do tools" in found["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [({"model": "none"}, 404, "does not exist"), ({"messages": []}, 400, "messages"), ({"urgency": "x"}, 400, "high")],
)
def test_route_refuses_what_inference_refuses(
    proxy: RunningProxy, fields: dict[str, object], status: int, words: str
) -> None:
    answer = post(f"{proxy.url}/route", json={**CHAT, "model": "big", **fields})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


# keys


def test_routes_that_need_a_key(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
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


def test_the_key_is_checked_before_the_body_is_read(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu)}, api_keys=[hash_key("sk-mine")])
    with httpx.Client(verify=False) as client:
        answer = client.post(f"{proxy.url}/v1/chat/completions", content=b"{not json")
    assert answer.status_code == 401


def test_the_backends_key_is_sent_to_the_backend_only(start: Callable[..., RunningProxy], gpu: FakeUpstream) -> None:
    proxy = start(backends={"vllm": backend(gpu, api_key="hush")})
    assert chat(proxy, headers={"authorization": "Bearer mine"}).status_code == 200
    assert gpu.talks[0].headers["authorization"] == "Bearer hush"
    pages = [get(proxy.url + path).text for path in ("/models/status", "/metrics", "/ready")]
    assert "hush" not in json.dumps(pages)
