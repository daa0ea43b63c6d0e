"""Tokens, reranking, scores and classes by the real engines. Audio, for which there is no small model: scripted, in
tests/integration/api/test_opaque.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import real_servers as servers
from tests.support.proxied_backend import ProxiedBackend, assert_openai_error
from tests.support.real_servers import CONTEXT, MODEL, Proxy, Server

Start = Callable[..., Proxy]
TEXT = "hello world"
TOKENS = [28120, 905]  # SmolLM2's
QUERY = {"query": "What is a panda?", "documents": ["It is a bear.", "Hi.", "A river in China is long."]}
# Small enough to start with random weights in seconds. One label makes it a model that scores.
TINY = {
    "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "num_labels": 1, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 49152, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip


def post(proxy: Proxy, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(proxy.url + path, json={"model": MODEL, **body}, timeout=60)


# tokens


def test_tokens_are_the_models_and_their_text_is_the_text(proxied: ProxiedBackend) -> None:
    answer = proxied.post("/tokenize", {"model": MODEL, "prompt": TEXT})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["tokens"] == TOKENS
    assert found["count"] == len(TOKENS)
    assert found["max_model_len"] == (None if proxied.kind == "llama_cpp_python" else CONTEXT), "it does not tell"
    back = proxied.post("/detokenize", {"model": MODEL, "tokens": TOKENS})
    assert back.json()["prompt"].strip() == TEXT, back.text
    assert answer.headers["x-backend"] == proxied.name
    assert "x-overhead-ms" in answer.headers


def test_messages_are_tokenized_by_vllm_only(proxied: ProxiedBackend) -> None:
    answer = proxied.post("/tokenize", {"model": MODEL, "messages": [{"role": "user", "content": TEXT}]})
    if proxied.kind == "vllm":
        assert answer.json()["count"] > 20, "the template adds a system prompt"
    else:
        assert "one text" in assert_openai_error(answer, 400)["message"]


def test_bad_tokens_are_the_clients_mistake(proxied: ProxiedBackend) -> None:
    assert_openai_error(proxied.post("/tokenize", {"model": MODEL}), 400, 422)
    assert_openai_error(proxied.post("/detokenize", {"model": MODEL, "tokens": "x"}), 400, 422)
    proxied.assert_answers()


def test_what_no_backend_has_is_refused_by_name(proxied: ProxiedBackend) -> None:
    """Learnt when the replica came up: nothing is tried."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/rerank": QUERY,
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/classify": {"input": "a"},
    }
    for path, body in bodies.items():
        error = assert_openai_error(proxied.post(path, {"model": MODEL, **body}), 400)
        assert f"with the model '{MODEL}'" in error["message"]
        assert f"{proxied.name} cannot do {path.rpartition('/')[2]}" in error["message"]
    files = {"file": ("a.wav", b"RIFF\0\0\0\0WAVE")}
    answer = httpx.post(f"{proxied.url}/v1/audio/transcriptions", data={"model": MODEL}, files=files, timeout=60)
    assert "cannot do transcriptions" in assert_openai_error(answer, 400)["message"]


# reranking


@pytest.fixture(scope="module")
def reranker(gguf: str, logs: Path) -> Iterator[Server]:
    server = servers.llama_server(logs / "reranker.log", gguf, "--embeddings", "--pooling", "rank")
    with servers.running(server):
        yield server


def test_llama_server_reranks(reranker: Server, start_proxy: Start) -> None:
    proxy = start_proxy("--llama-cpp", reranker.url, "--engine", "llama-server")
    proxy.wait_ready()
    own = httpx.post(f"{reranker.url}/v1/rerank", json=QUERY, timeout=60).json()
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        answer = post(proxy, path, QUERY)
        assert answer.status_code == 200, answer.text
        assert [each["index"] for each in answer.json()["results"]] == [each["index"] for each in own["results"]]
        assert answer.json()["usage"] == own["usage"]
    assert "query" in assert_openai_error(post(proxy, "/rerank", {"documents": ["a"]}), 400)["message"]


def test_a_request_goes_past_the_engine_that_does_not_rerank(
    reranker: Server, vllm_server: Server, start_proxy: Start
) -> None:
    proxy = start_proxy("--vllm", vllm_server.url, "--llama-cpp", reranker.url, "--engine", "llama-server")
    proxy.wait_ready()
    answer = post(proxy, "/v1/rerank", QUERY)
    assert (answer.status_code, answer.headers["x-backend"], answer.headers["x-attempts"]) == (200, "llama_cpp", "1")
    tokens = post(proxy, "/tokenize", {"prompt": TEXT, "backend": "vllm"})
    assert (tokens.json()["tokens"], tokens.headers["x-backend"]) == (TOKENS, "vllm")


# scores and classes


@pytest.fixture(scope="module")
def scorer(
    vllm_program: str, vllm_model: str, logs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """vLLM with a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("scorer")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        source = Path(vllm_model) / name
        if source.exists():
            shutil.copy(source, folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    server = servers.vllm(logs / "scorer.log", vllm_program, str(folder), tools=False)
    server.command += ["--load-format", "dummy"]
    with servers.running(server):
        yield server


@pytest.mark.timeout(900)
def test_vllm_scores_classifies_and_reranks(scorer: Server, start_proxy: Start) -> None:
    proxy = start_proxy("--vllm", scorer.url)
    proxy.wait_ready()
    requests: dict[str, tuple[dict[str, Any], str]] = {
        "/v1/score": ({"text_1": "a", "text_2": ["b", "c d"]}, "data"),
        "/classify": ({"input": ["a", "b c"]}, "data"),
        "/v1/rerank": (QUERY, "results"),
    }
    for path, (body, field) in requests.items():
        own = httpx.post(scorer.url + path, json={"model": MODEL, **body}, timeout=60).json()
        answer = post(proxy, path, body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()[field]) == len(own[field]) > 1
        assert answer.json()["model"] == MODEL
    chat = post(proxy, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert "cannot do generation" in assert_openai_error(chat, 400)["message"]
    assert_openai_error(post(proxy, "/v1/score", {"text_1": "a"}), 400, 422)
    assert post(proxy, "/v1/rerank", QUERY).status_code == 200
