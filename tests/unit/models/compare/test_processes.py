"""A worker that fails says which model, and why."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from xgen_proxy.models.compare.processes import Worker
from xgen_proxy.models.errors import ModelError


def worker_process() -> psutil.Process:
    """Other tests of this process may have children that still run."""
    [child] = [each for each in psutil.Process().children() if "xgen_proxy.models.compare.worker" in each.cmdline()]
    return child


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"GGUF" + bytes(200))
    with Worker(model, tmp_path / "log") as worker, pytest.raises(ModelError) as raised:
        worker.ask("load", path=str(model), context=64, threads=1, mmap=True)
    assert str(raised.value).startswith(f"{model}: llama.cpp cannot load it (")
    assert "\n" not in str(raised.value)
    assert "Traceback" in (tmp_path / "log").read_text()


def test_the_process_is_another_one_and_ends_with_the_block(tmp_path: Path) -> None:
    with Worker(tmp_path / "none.gguf", tmp_path / "log") as worker:
        assert worker.ask("memory") > 1e7
        child = worker_process()
        assert child.pid != os.getpid()
    assert not psutil.pid_exists(child.pid)


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    model = tmp_path / "large.gguf"
    with Worker(model, tmp_path / "log") as worker:
        worker.ask("memory")
        child = worker_process()
        child.send_signal(signal.SIGKILL)
        with pytest.raises(ModelError, match=r"large\.gguf: its process ended by SIGKILL, as when memory runs out"):
            worker.ask("memory")


def test_a_command_that_fails(tmp_path: Path) -> None:
    with (
        Worker(tmp_path / "a.gguf", tmp_path / "log") as worker,
        pytest.raises(ModelError, match=r"a\.gguf: tokenize: no model was loaded"),
    ):
        worker.ask("tokenize", text="x")
