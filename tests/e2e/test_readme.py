"""The examples of README.md and docs/api.md, run unchanged against a real backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import documents
from tests.support.documents import README, ROOT, blocks
from tests.support.real_servers import Proxy, Server

ADDRESS = "http://127.0.0.1:8080"
PYTHON = blocks(README, "python")


def shell_examples() -> list[str]:
    """The shell blocks that need a running proxy. tests/repo/test_docs.py checks the others."""
    pages = (README, ROOT / "docs" / "api.md")
    return [block for page in pages for block in blocks(page, "sh") if "curl" in block or "| xgen-proxy" in block]


@pytest.fixture(scope="module")
def url(start_proxy: Callable[..., Proxy], llama_cpp_python: Server) -> str:
    proxy = start_proxy("--llama-cpp", llama_cpp_python.url)
    proxy.wait_ready()
    return proxy.url


@pytest.fixture
def run(url: str, tmp_path: Path) -> Callable[..., str]:
    """run(program, *arguments) → its output. `xgen-proxy` is on PATH and uses this proxy."""
    script = tmp_path / "xgen-proxy"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m xgen_proxy.cli "$@" --url {url}\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_openai_example(run: Callable[..., str], url: str) -> None:
    """With `urgency: high` the answer is deterministic."""
    [example] = [block for block in PYTHON if "from openai" in block]
    assert "Paris" in run(sys.executable, "-c", example.replace(ADDRESS, url))


def test_langchain_example(run: Callable[..., str], url: str) -> None:
    """The answer is sampled, so its words vary."""
    [example] = [block for block in PYTHON if "from langchain_openai" in block]
    assert len(run(sys.executable, "-c", example.replace(ADDRESS, url)).split()) > 1


def test_every_python_example_is_run() -> None:
    assert len(PYTHON) == 2


@pytest.mark.parametrize("example", shell_examples(), ids=lambda block: documents.words(block)[1])
def test_shell(run: Callable[..., str], url: str, example: str) -> None:
    output = run("bash", "-ec", example.replace(ADDRESS, url))
    if "xgen-proxy" in example:
        assert "only: no GPU backend is up" in output
        assert "llama_cpp@" in output.partition("busy")[2], "status does not show the replica"
    else:
        answer = json.loads(output)
        assert any(answer.get(name) for name in ("choices", "text", "candidates")), output
    if "capital of France" in example and "temperature" in example:
        assert "Paris" in output
