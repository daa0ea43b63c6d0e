"""Engines started with other flags than ours: each serves what it can, and nothing that it cannot takes it out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import real_servers as servers
from tests.support.real_servers import MODEL, Proxy
from tests.support.waiting import wait_until

Start = Callable[..., Proxy]
USER = {"role": "user", "content": "Say yes."}
CHECKS_ROLES = """\
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
<|im_start|>assistant
"""
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def chat(proxy: Proxy, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": messages or (USER,), "max_tokens": 4, **fields}
    return httpx.post(f"{proxy.url}/v1/chat/completions", json=body, timeout=120)


def up(proxy: Proxy) -> dict[str, bool]:
    status = httpx.get(f"{proxy.url}/models/status", timeout=10).json()
    return {backend["name"]: all(replica["up"] for replica in backend["replicas"]) for backend in status["backends"]}


def test_llama_server_without_metrics(gguf: str, tmp_path: Path, start_proxy: Start) -> None:
    with servers.running(servers.llama_server(tmp_path / "llama.log", gguf, metrics=False)) as llama:
        assert httpx.get(f"{llama.url}/metrics").status_code == 501
        proxy = start_proxy("--llama-cpp", llama.url, "--engine", "llama-server")
        proxy.wait_ready()
        assert chat(proxy).status_code == 200
        assert up(proxy) == {"llama_cpp": True}


def test_llama_server_for_embeddings(gguf: str, tmp_path: Path, start_proxy: Start) -> None:
    with servers.running(
        servers.llama_server(tmp_path / "llama.log", gguf, "--embeddings", "--pooling", "mean")
    ) as llama:
        env = {"XGEN_BACKENDS__LLAMA_CPP__EMBEDDINGS": "true"}
        proxy = start_proxy("--llama-cpp", llama.url, "--engine", "llama-server", env=env)
        proxy.wait_ready()
        assert chat(proxy).status_code == 200, "this version generates, too; older ones answer 501"
        body = {"model": MODEL, "input": ["a river", "the sea"]}
        answer = httpx.post(f"{proxy.url}/v1/embeddings", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 2
        assert up(proxy) == {"llama_cpp": True}


def test_llama_server_that_sleeps_is_left_to_sleep(gguf: str, tmp_path: Path, start_proxy: Start) -> None:
    def sleeps() -> bool:
        return bool(httpx.get(f"{llama.url}/props", timeout=10).json()["is_sleeping"])

    with servers.running(servers.llama_server(tmp_path / "llama.log", gguf, "--sleep-idle-seconds", "3")) as llama:
        proxy = start_proxy("--llama-cpp", llama.url, "--engine", "llama-server")
        proxy.wait_ready()
        assert chat(proxy).status_code == 200
        wait_until(sleeps, 30, "llama-server to sleep while the proxy watches it")
        assert up(proxy) == {"llama_cpp": True}
        assert chat(proxy).status_code == 200


def test_template_that_checks_roles(gguf: str, tmp_path: Path, start_proxy: Start) -> None:
    template = tmp_path / "roles.jinja"
    template.write_text(CHECKS_ROLES)
    with servers.running(
        servers.llama_server(tmp_path / "llama.log", gguf, "--chat-template-file", str(template))
    ) as llama:
        proxy = start_proxy("--llama-cpp", llama.url, "--engine", "llama-server")
        proxy.wait_ready()
        for stream in (False, True, False, True):
            refused = chat(proxy, USER, USER, stream=stream)
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["type"] == "invalid_request_error"
            assert "roles must alternate" in refused.json()["error"]["message"]
            assert refused.headers["x-should-retry"] == "false"
        assert chat(proxy).status_code == 200
        assert up(proxy) == {"llama_cpp": True}


@pytest.mark.timeout(900)
def test_vllm_without_tool_parser(vllm_program: str, vllm_model: str, tmp_path: Path, start_proxy: Start) -> None:
    """The first refusal teaches the proxy, which says what to start vLLM with; vLLM serves everything else."""
    with servers.running(servers.vllm(tmp_path / "vllm.log", vllm_program, vllm_model, tools=False)) as vllm:
        proxy = start_proxy("--vllm", vllm.url)
        proxy.wait_ready()
        for _ in range(4):
            refused = chat(proxy, tools=[TOOL], tool_choice="auto")
            assert refused.status_code == 400, refused.text
            assert "tool" in refused.json()["error"]["message"]
        warnings = [line for line in proxy.log.read_text().splitlines() if "start vLLM with --enable-auto-tool" in line]
        assert len([line for line in warnings if "attempt failed" not in line]) == 1, "the remedy is logged once"
        assert chat(proxy).status_code == 200
        assert up(proxy) == {"vllm": True}
