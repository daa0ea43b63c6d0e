"""Every route of the API, against each backend."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import real_servers as servers
from tests.support.proxied_backend import CAPITAL, GREEDY, Json, ProxiedBackend, assert_openai_error, chat
from tests.support.real_servers import CONTEXT, MODEL, Proxy, Server

PROMPTS = {
    "english": "Name three colours.",
    "korean": "한국의 수도는 어디입니까?",
    "emoji": "Answer with the emoji of a cat 🐈 and of a dog 🐕.",
    "code": "Write `for i in range(3): print(i)` and nothing else.",
}


def events(body: str) -> list[str]:
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]


def counts(usage: Json) -> dict[str, int]:
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


# Usage


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_usage_equals_the_backends_own(proxied: ProxiedBackend, prompt: str) -> None:
    ask = chat(prompt)
    own = proxied.direct("/v1/chat/completions", ask).json()
    whole = proxied.post("/v1/chat/completions", ask).json()
    assert counts(whole["usage"]) == counts(own["usage"])

    ask = {**ask, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = events(proxied.post("/v1/chat/completions", ask).text)
    assert done == "[DONE]"
    last = json.loads(chunks[-1])
    assert last["choices"] == []
    assert counts(last["usage"]) == counts(own["usage"])
    assert not [chunk for chunk in map(json.loads, chunks[:-1]) if chunk.get("usage")]


def test_usage_of_completions(proxied: ProxiedBackend) -> None:
    ask = {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 6, **GREEDY}
    own = proxied.direct("/v1/completions", ask).json()["usage"]
    assert counts(proxied.post("/v1/completions", ask).json()["usage"]) == counts(own)
    ask = {**ask, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, _done = events(proxied.post("/v1/completions", ask).text)
    assert counts(json.loads(chunks[-1])["usage"]) == counts(own)


# A non-streaming response equals the backend's own, also when the proxy collected it from a stream

SAME_ANSWERS: dict[str, tuple[str, Json]] = {
    "chat": ("/v1/chat/completions", chat()),
    "chat, cut": ("/v1/chat/completions", chat(max_tokens=3)),
    "chat, stop word": ("/v1/chat/completions", chat(stop=["Paris"])),
    "chat, korean": ("/v1/chat/completions", chat(PROMPTS["korean"])),
    "chat, logprobs": ("/v1/chat/completions", chat(logprobs=True, top_logprobs=2, max_tokens=4)),
    "chat, json": ("/v1/chat/completions", chat(response_format={"type": "json_object"}, max_tokens=16)),
    "completions": ("/v1/completions", {"model": MODEL, "prompt": "One, two,", "max_tokens": 6, **GREEDY}),
    "completions, stop word": (
        "/v1/completions",
        {"model": MODEL, "prompt": "One, two,", "max_tokens": 12, "stop": "five", **GREEDY},
    ),
}

# Fields that differ between two answers: ids, timings, cached tokens.
FLEETING = ("id", "created", "timings", "prompt_tokens_details", "system_fingerprint")


def expected(own: Any, answer: Any) -> Any:
    """`own` with the varying fields of `answer`. Floats may differ slightly: batching changes logprobs."""
    if isinstance(own, dict) and isinstance(answer, dict):
        return {
            name: answer.get(name) if name in FLEETING else expected(item, answer.get(name))
            for name, item in own.items()
        }
    if isinstance(own, list) and isinstance(answer, list) and len(own) == len(answer):
        return [expected(*pair) for pair in zip(own, answer, strict=True)]
    return pytest.approx(own, abs=0.05) if isinstance(own, float) else own


@pytest.mark.parametrize(("path", "ask"), SAME_ANSWERS.values(), ids=SAME_ANSWERS)
def test_non_streaming_responses_equal_the_backends_own(proxied: ProxiedBackend, path: str, ask: Json) -> None:
    own = proxied.direct(path, ask)
    assert own.status_code == 200, own.text
    answer = proxied.post(path, ask)
    assert answer.status_code == 200, answer.text
    assert answer.json() == expected(own.json(), answer.json())


# Models


def test_models(proxied: ProxiedBackend) -> None:
    with openai.OpenAI(base_url=proxied.url + "/v1", api_key="none", max_retries=0) as client:
        models = client.models.list().data
        assert [model.id for model in models] == [MODEL]
        assert models[0].object == "model"
        assert models[0].created > 0
        assert models[0].owned_by
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve("nope")
    assert unknown.value.code == "model_not_found"


def test_a_missing_model_means_the_default(proxied: ProxiedBackend) -> None:
    ask = chat()
    del ask["model"]
    answer = proxied.post("/v1/chat/completions", ask)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == MODEL


def test_responses_carry_the_public_model_name(proxied: ProxiedBackend, start_proxy: Callable[..., Proxy]) -> None:
    setting = f"XGEN_BACKENDS__{proxied.name.upper()}__"
    dialect = {"vllm": "vllm"}.get(proxied.kind, proxied.backend.name)
    env = {
        setting + "URLS": proxied.backend.url,
        setting + "DIALECT": dialect,
        setting + "MODELS": json.dumps({'pub"lic': MODEL}),
    }
    proxy = start_proxy(env=env)
    proxy.wait_ready()
    ask = chat(model='pub"lic')
    whole = httpx.post(proxy.url + "/v1/chat/completions", json=ask, timeout=30)
    assert whole.status_code == 200, whole.text
    assert whole.json()["model"] == 'pub"lic'
    chunks = events(httpx.post(proxy.url + "/v1/chat/completions", json={**ask, "stream": True}, timeout=30).text)
    assert {json.loads(chunk)["model"] for chunk in chunks[:-1]} == {'pub"lic'}
    assert_openai_error(httpx.post(proxy.url + "/v1/chat/completions", json=chat(), timeout=30), 404)
    proxy.stop()


# Embeddings

INPUTS = ["A cat sat on the mat.", "Die Katze."]


@pytest.fixture(scope="module")
def embedder(logs: Path, gguf: str, start_proxy: Callable[..., Proxy]) -> Iterator[ProxiedBackend]:
    backend = servers.llama_server(logs / "embedder.log", gguf, "--embeddings", "--pooling", "mean", slots=1)
    try:
        backend.start().wait_ready()
        env = {"XGEN_BACKENDS__LLAMA_CPP__EMBEDDINGS": "true"}
        proxy = start_proxy("--llama-cpp", backend.url, "--engine", backend.name, env=env)
        proxy.wait_ready()
        yield ProxiedBackend("llama_server", "llama_cpp", proxy, backend)
        proxy.stop()
    finally:
        backend.stop()


def test_embeddings(embedder: ProxiedBackend) -> None:
    with openai.OpenAI(base_url=embedder.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model=MODEL, input=INPUTS, encoding_format="float")
        packed = client.embeddings.create(model=MODEL, input=INPUTS)  # the SDK requests base64 by default
    assert answer.model == MODEL
    assert [item.index for item in answer.data] == [0, 1]
    assert [len(item.embedding) for item in answer.data] == [576, 576]
    assert answer.usage.prompt_tokens > 0
    for floats, same in zip(answer.data, packed.data, strict=True):
        assert floats.embedding == pytest.approx(same.embedding, abs=1e-4)


def test_embeddings_in_base64(embedder: ProxiedBackend) -> None:
    ask = {"model": MODEL, "input": INPUTS[0], "encoding_format": "base64"}
    item = embedder.post("/v1/embeddings", ask).json()["data"][0]
    assert len(struct.unpack("<576f", base64.b64decode(item["embedding"]))) == 576


def test_embeddings_without_a_capable_backend(proxied: ProxiedBackend) -> None:
    error = assert_openai_error(proxied.post("/v1/embeddings", {"model": MODEL, "input": "cat"}), 400, 404)
    assert "embed" in error["message"]
    proxied.assert_answers()


# The minimal completion API


def test_generate(proxied: ProxiedBackend) -> None:
    ask = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    answer = proxied.post("/generate", ask)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["text"]
    assert body["backend_used"] == proxied.name
    assert 0 < body["generation_time"] < 60
    tokens = body["tokens_per_second"] * body["generation_time"]
    assert tokens == pytest.approx(round(tokens), abs=0.1 * tokens)
    assert 1 <= round(tokens) <= 12


def test_generate_stream(proxied: ProxiedBackend) -> None:
    ask = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    with httpx.stream("POST", proxied.url + "/generate/stream", json=ask, timeout=60) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-backend"] == proxied.name
        got = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    assert got[-1] == {"done": True}
    assert all(list(event) == ["token"] for event in got[:-1])
    assert "".join(event["token"] for event in got[:-1]) == proxied.post("/generate", ask).json()["text"]


def test_generate_with_stream_true_streams(proxied: ProxiedBackend) -> None:
    answer = proxied.post("/generate", {"prompt": "Hi", "max_tokens": 2, "stream": True})
    assert json.loads(events(answer.text)[-1]) == {"done": True}


@pytest.mark.parametrize(
    "body", [{}, {"prompt": 5}, {"prompt": "Hi", "max_tokens": -1}, {"prompt": "Hi", "urgency": "now"}, []]
)
def test_generate_errors_have_a_message(proxied: ProxiedBackend, body: Any) -> None:
    for path in ("/generate", "/generate/stream"):
        assert_openai_error(proxied.post(path, body), 400)
    proxied.assert_answers()


# Presets and hints


def test_hints_are_removed_and_presets_apply(proxied: ProxiedBackend) -> None:
    plain = proxied.chat(temperature=0, top_p=1, top_k=1, max_tokens=6).json()
    hinted = proxied.post(
        "/v1/chat/completions",
        {"model": MODEL, "messages": CAPITAL, "max_tokens": 6, "urgency": "high", "backend": "auto", "fallback": None},
    )
    assert hinted.status_code == 200, hinted.text
    assert hinted.json()["choices"][0]["message"] == plain["choices"][0]["message"]


# Operations


def test_health_and_ready(proxied: ProxiedBackend) -> None:
    assert proxied.get("/health").status_code == 200
    assert proxied.get("/ready").status_code == 200


def test_ready_fails_while_no_backend_answers(start_proxy: Callable[..., Proxy]) -> None:
    proxy = start_proxy("--llama-cpp", f"http://127.0.0.1:{servers.free_port()}")
    assert httpx.get(proxy.url + "/health").status_code == 200
    assert httpx.get(proxy.url + "/ready").status_code == 503
    answer = httpx.post(proxy.url + "/v1/chat/completions", json=chat(), timeout=30)
    assert_openai_error(answer, 502, 503)
    assert answer.headers["x-should-retry"] == "false"
    proxy.stop()


def test_models_status(proxied: ProxiedBackend) -> None:
    proxied.assert_answers()
    status = proxied.get("/models/status")
    assert status.status_code == 200
    [backend] = status.json()["backends"]
    [replica] = backend["replicas"]
    assert backend["name"] == proxied.name
    assert backend["models"] == {MODEL: MODEL}
    # llama-cpp-python does not report its context length; it has to be configured.
    assert backend["context"] == (None if proxied.kind == "llama_cpp_python" else CONTEXT)
    assert replica["url"] == proxied.backend.url
    assert replica["state"] == "up"
    assert replica["in_flight"] == 0
    assert replica["slots"] >= 1
    assert replica["memory"]["process_rss_bytes"] > 100e6


def test_models_status_tells_the_kv_cache_or_the_model(proxied: ProxiedBackend) -> None:
    proxied.assert_answers()
    [backend] = proxied.get("/models/status").json()["backends"]
    [replica] = backend["replicas"]
    cache, model = replica["kv_cache"], replica["model"]
    if proxied.kind == "vllm":
        assert cache["blocks"] * cache["block_size"] >= CONTEXT
        assert cache["tokens"] == cache["blocks"] * cache["block_size"]
        assert cache["bytes"] == 2**30  # VLLM_CPU_KVCACHE_SPACE=1
        assert 0 < cache["memory_utilization"] <= 1
        assert (cache["prefix_caching"], cache["preemptions"]) == (True, 0)
        assert 0 <= cache["prefix_hit_rate"] <= 1
        assert 0 <= replica["memory"]["kv_usage"] < 1
        assert model is None, "vLLM tells nothing about its model"
        return
    assert cache is None
    shape = {"vocabulary": 49_152, "context": 8192, "layers": 30, "width": 576}
    assert shape.items() <= model.items()
    assert 90e6 < replica["memory"]["model_file_bytes"] < 100e6
    if proxied.kind == "llama_server":
        assert model["parameters"] == 134_515_008
        assert 90e6 < model["bytes"] < replica["memory"]["model_file_bytes"]
        assert model["quantization"] == "Q4_1"


def test_metrics_can_be_scraped(proxied: ProxiedBackend) -> None:
    proxied.assert_answers()
    page = proxied.get("/metrics")
    assert page.status_code == 200
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    ours = [name for name in families if name.startswith("xgen_")]
    assert ours, sorted(families)
    labels = [sample.labels for name in ours for sample in families[name].samples]
    assert any(label.get("backend") == proxied.name for label in labels)


def test_route_is_a_dry_run(proxied: ProxiedBackend) -> None:
    plan = proxied.post("/route", chat("Hi"))
    assert plan.status_code == 200, plan.text
    first = plan.json()["candidates"][0]
    assert first["backend"] == proxied.name
    assert first["reason"]
    assert "X-Backend" not in plan.headers


# Keys


def test_keys(llama_cpp_python: Server, start_proxy: Callable[..., Proxy]) -> None:
    env = {"XGEN_API_KEYS": hashlib.sha256(b"sesame").hexdigest()}
    proxy = start_proxy("--llama-cpp", llama_cpp_python.url, env=env)
    proxy.wait_ready()
    ask: dict[str, Any] = {"model": MODEL, "messages": CAPITAL, "max_tokens": 2}
    for key in ("wrong", "Sesame"):
        with openai.OpenAI(base_url=proxy.url + "/v1", api_key=key, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.chat.completions.create(**ask)
            assert refused.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key="sesame", max_retries=0) as client:
        assert client.chat.completions.create(**ask).choices
    for path in ("/v1/chat/completions", "/generate", "/generate/stream", "/route"):
        assert_openai_error(httpx.post(proxy.url + path, json=chat()), 401)
    for path in ("/v1/models", f"/v1/models/{MODEL}"):
        assert_openai_error(httpx.get(proxy.url + path), 401)
    for path in ("/health", "/ready", "/metrics", "/models/status"):
        assert httpx.get(proxy.url + path).status_code == 200
    proxy.stop()
