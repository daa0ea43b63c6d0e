"""The examples of the README and of the API's page, run as they stand there, against a real backend."""

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
    """The blocks of commands that ask a running proxy; tests/test_docs.py looks after the others."""
    pages = (README, ROOT / "docs" / "api.md")
    return [block for page in pages for block in blocks(page, "sh") if "curl" in block or "| xgen-proxy" in block]


@pytest.fixture(scope="module")
def url(start_proxy: Callable[..., Proxy], llama_cpp_python: Server) -> str:
    proxy = start_proxy("--llama-cpp", llama_cpp_python.url)
    proxy.wait_ready()
    return proxy.url


@pytest.fixture
def run(url: str, tmp_path: Path) -> Callable[..., str]:
    """run(program, *arguments) → what it prints. The console script is on PATH, and finds this proxy by itself."""
    script = tmp_path / "xgen-proxy"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m xgen_proxy.cli "$@" --url {url}\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("number", range(len(PYTHON)), ids=["openai", "langchain"])
def test_python(run: Callable[..., str], url: str, number: int) -> None:
    said = run(sys.executable, "-c", PYTHON[number].replace(ADDRESS, url))
    assert said.strip()
    assert "Paris" in said or "urgency" not in PYTHON[number], "urgent work is deterministic, the rest is sampled"


@pytest.mark.parametrize("example", shell_examples(), ids=lambda block: documents.words(block)[1])
def test_shell(run: Callable[..., str], url: str, example: str) -> None:
    said = run("bash", "-ec", example.replace(ADDRESS, url))
    if "xgen-proxy" in example:
        assert "only: no GPU backend is up" in said
        assert "llama_cpp@" in said.partition("busy")[2], "status shows the replica"
    else:
        answer = json.loads(said)
        found = [answer[name] for name in ("choices", "text", "candidates") if name in answer]
        assert any(found), said
        assert "Paris" in said or "capital of France" not in example
