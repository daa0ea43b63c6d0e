"""`make run` as a user sees it: real llama.cpp servers, the real proxy, real signals and faults."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.processes import is_running
from tests.support.waiting import wait_until

START_S = 120.0  # this machine may be busy
ENGINES = ["llama-cpp-python", "llama-server"]
LOAD_ERRORS = {
    "llama-cpp-python": "Failed to load model from file",
    "llama-server": "exiting due to model loading error",
}


def children(pid: int) -> list[int]:
    if not psutil.pid_exists(pid):
        return []
    return [child.pid for child in psutil.Process(pid).children() if is_running(child.pid)]


def all_ended(pids: list[int]) -> bool:
    return not any(is_running(pid) for pid in pids)


def command_of(pid: int) -> str:
    return " ".join(psutil.Process(pid).cmdline())


def obey_hangups() -> None:
    """Under nohup, tests and their children inherit an ignored SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass
class Run:
    """`python -m backends.local` as a child process, its output in a file."""

    process: subprocess.Popen[bytes]
    words: Path
    folder: Path

    def said(self) -> str:
        return self.words.read_text(errors="replace")

    def url(self) -> str:
        """The URL of the proxy, once it listens."""
        found = wait_until(lambda: re.search(r"listens on (http://\S+)", self.said()) or self.process.poll(), START_S)
        assert isinstance(found, re.Match), self.said()
        return str(found[1])

    def ended(self, seconds: float = 60.0) -> int:
        return self.process.wait(seconds)

    def backends(self) -> list[int]:
        names = ("llama_cpp.server", "llama_cpp.llama_server")
        return sorted(pid for pid in children(self.process.pid) if any(name in command_of(pid) for name in names))


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path, gguf: str) -> Iterator[Start]:
    """start(*flags, env={}) → a Run. Its children must end when it is killed."""
    runs: list[Run] = []

    def start(*flags: str, model: str = gguf, env: dict[str, str] | None = None) -> Run:
        words = tmp_path / f"words-{len(runs)}"
        command = [sys.executable, "-m", "backends.local", "--port", "0", "--model", model]
        with words.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--run-dir", str(tmp_path / "run"), *flags],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(env or {})},
                process_group=0, preexec_fn=obey_hangups,
            )  # fmt: skip
        runs.append(Run(process, words, tmp_path / "run"))
        return runs[-1]

    yield start
    for run in runs:
        family = children(run.process.pid)
        run.process.kill()
        run.process.wait()
        wait_until(partial(all_ended, family), START_S)


def chat(url: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=START_S)


@pytest.mark.parametrize("engine", ENGINES)
def test_printed_examples_work_and_ctrl_c_leaves_nothing(start: Start, engine: str) -> None:
    # HTTP proxies in the environment must not be used for servers on this machine
    run = start("--engine", engine, env={"http_proxy": "http://127.0.0.1:9", "PORT": "9"})
    run.url()
    family = children(run.process.pid)
    assert len(family) == 2, "one backend and the proxy"

    curl = re.search(r"^\s*(curl .*\\\n.*)$", run.said(), re.MULTILINE)
    assert curl, run.said()
    answer = subprocess.run(["bash", "-c", curl[1]], capture_output=True, text=True, timeout=START_S, check=True)
    assert "Paris" in answer.stdout

    snippet = [line.strip() for line in run.said().splitlines() if re.match(r"\s+(from|chat|print)\b", line)]
    assert len(snippet) == 3, run.said()
    said = subprocess.run(
        [sys.executable, "-c", "\n".join(snippet)], capture_output=True, text=True, timeout=START_S, check=True
    )
    assert said.stdout.strip()

    os.kill(run.process.pid, signal.SIGINT)
    assert run.ended() == 0, run.said()
    assert all_ended(family)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_while_it_loads(start: Start, number: int) -> None:
    run = start()
    family = wait_until(lambda: children(run.process.pid), START_S)
    os.kill(run.process.pid, number)
    run.ended()
    wait_until(lambda: all_ended(family), START_S)


def test_children_die_with_a_killed_supervisor(start: Start) -> None:
    run = start("--engine", "llama-server", "--replicas", "2")
    run.url()
    family = children(run.process.pid)
    assert len(family) == 3, "two backends and the proxy"
    run.process.kill()
    wait_until(lambda: all_ended(family), START_S)


def test_running_streams_finish_before_it_ends(start: Start) -> None:
    run = start("--engine", "llama-server")
    url = run.url()
    body = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=START_S) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        os.kill(run.process.pid, signal.SIGINT)
        rest = list(lines)
    assert first.startswith("data: ")
    assert "data: [DONE]" in rest
    assert any('"finish_reason":"length"' in line for line in rest)
    assert run.ended() == 0


def test_a_dead_backend_is_restarted(start: Start) -> None:
    run = start("--engine", "llama-server")
    url = run.url()
    (backend,) = run.backends()
    os.kill(backend, signal.SIGKILL)
    wait_until(lambda: "died; starting it again" in run.said(), START_S)
    wait_until(lambda: run.backends() not in ([], [backend]), START_S)
    wait_until(lambda: chat(url).status_code == 200, START_S)


def test_a_dead_proxy_ends_it(start: Start) -> None:
    run = start("--engine", "llama-server")
    run.url()
    (proxy,) = set(children(run.process.pid)) - set(run.backends())
    os.kill(proxy, signal.SIGKILL)
    assert run.ended() == 1
    assert "the proxy died" in run.said()


def test_replicas_and_a_gpu_backend(start: Start) -> None:
    with closing(FakeUpstream()) as gpu:
        run = start("--engine", "llama-server", "--replicas", "2", "--vllm", gpu.url)
        status = httpx.get(f"{run.url()}/models/status").json()
    sizes = {backend["name"]: len(backend["replicas"]) for backend in status["backends"]}
    assert sizes == {"vllm": 1, "llama_cpp": 2}


def test_a_second_make_run_names_the_first(start: Start) -> None:
    first = start("--engine", "llama-server")
    wait_until(lambda: children(first.process.pid), START_S)
    second = start("--engine", "llama-server")
    assert second.ended() == 1
    assert f"process {first.process.pid}" in second.said()
    assert first.process.poll() is None


def test_a_taken_port_is_reported_with_its_process(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start("--port", str(port))
        assert run.ended() == 1
    assert f"127.0.0.1:{port}" in run.said()
    assert f"process {os.getpid()}" in run.said()
    assert "PORT=" in run.said()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_load_shows_the_servers_last_lines(start: Start, engine: str, tmp_path: Path, gguf: str) -> None:
    unknown = tmp_path / "unknown.gguf"
    shutil.copy(gguf, unknown)
    with unknown.open("r+b") as file:  # a whole GGUF file, of an architecture that llama.cpp does not have
        file.seek(file.read(4096).index(b"general.architecture") + len(b"general.architecture") + 4 + 8)
        file.write(b"llamz")
    run = start("--engine", engine, model=str(unknown))
    assert run.ended(START_S) == 1
    assert "died while starting" in run.said()
    assert str(run.folder) in run.said(), "the path of the log is missing"
    assert LOAD_ERRORS[engine] in run.said()


@pytest.mark.parametrize(("content", "message"), [(None, "there is no model file"), (b"<html>", "is not a GGUF file")])
def test_a_wrong_model_file_is_reported_before_anything_starts(
    start: Start, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    began = time.monotonic()
    run = start(model=str(file))
    assert run.ended() == 1
    assert message in run.said()
    assert "Traceback" not in run.said()
    assert not (run.folder / "proxy.log").exists()
    assert time.monotonic() - began < START_S


def test_an_unwritable_folder_is_reported(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = start("--run-dir", str(tmp_path / "file" / "run"))
    assert run.ended() == 1
    assert run.said().startswith("error: ")
    assert str(tmp_path / "file") in run.said()


@pytest.mark.parametrize(
    "flags", [("--replicas", "0"), ("--engine", "ollama"), ("--port", "none"), ("--port", "65536"), ("--ctx", "0")]
)
def test_wrong_flags_are_rejected(start: Start, flags: tuple[str, str]) -> None:
    run = start(*flags)
    assert run.ended() == 2
    assert flags[0] in run.said()
