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
    """The shell blocks that ask a running proxy. tests/repo/test_docs.py checks those that are not run.

    No engine here writes down speech: the form is sent in tests/integration/api/test_opaque.py.
    """
    pages = (README, ROOT / "docs" / "api.md")
    asking = [block for page in pages for block in blocks(page, "sh") if "curl" in block or "| xgen-proxy" in block]
    return [block for block in asking if "speech.wav" not in block]


def example_with(words: str) -> str:
    """The README's shell block that has these words."""
    [block] = [block for block in blocks(README, "sh") if words in block]
    return block


@pytest.fixture(scope="module")
def url(start_proxy: Callable[..., Proxy], llama_cpp_python: Server) -> str:
    proxy = start_proxy("--llama-cpp", llama_cpp_python.url)
    proxy.wait_ready()
    return proxy.url


@pytest.fixture
def run(url: str, tmp_path: Path) -> Callable[..., str]:
    """run(program, *arguments) → its output. `xgen-proxy` is on PATH and asks this proxy by default."""
    script = tmp_path / "xgen-proxy"
    default = f'case $1 in route|status|launch) set -- "$@" --url {url} ;; esac'
    script.write_text(f'#!/bin/sh\n{default}\nexec {sys.executable} -m xgen_proxy.cli "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*command: str, cwd: Path = ROOT) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
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


def test_models_and_costs(run: Callable[..., str], url: str, gguf: str, tmp_path: Path) -> None:
    """In a folder of its own, since a table of prices is written."""
    (tmp_path / "models").symlink_to(Path(gguf).resolve().parent)
    example = example_with("xgen-proxy cost").replace(ADDRESS, url).replace("--for 60", "--for 1")
    output = run("bash", "-ec", example, cwd=tmp_path)
    assert "SmolLM2" in output
    assert "per 1,000 requests" in output
    assert (tmp_path / "prices.toml").exists()


def test_launch(run: Callable[..., str], url: str, tmp_path: Path) -> None:
    """With a stand-in for Claude Code, which tests/e2e/test_client_matrix.py runs itself."""
    claude = tmp_path / "claude"
    claude.write_text('#!/bin/sh\necho "$ANTHROPIC_BASE_URL $ANTHROPIC_DEFAULT_SONNET_MODEL"\n')
    claude.chmod(0o755)
    assert run("bash", "-ec", example_with("xgen-proxy launch")) == f"{url} smollm2\n"
