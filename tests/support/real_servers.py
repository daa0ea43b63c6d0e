"""Real servers as child processes on free ports, which tests can kill and restart, and which never outlive the tests.

Each server leads its own process group, because a killed vLLM leaves its engine processes running. The groups stay in
the session of the test run, so that `.ci/run` can end the servers of a killed pytest.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.support.waiting import wait_until

MODEL = "smollm2"  # the model's name on every test server
CONTEXT = 2048  # tokens per request, on every test server
VLLM_SLOTS = 16


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """A child's environment, without our settings and without variables that slow down its start."""
    keep = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XGEN_", "COVERAGE_", "COV_CORE_")) and name != "PYTHONDONTWRITEBYTECODE"
    }
    return {**keep, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **extra}


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server, ready; it is stopped at the end."""
    try:
        yield server.start().wait_ready()
    finally:
        server.stop()


def members(group: int) -> list[int]:
    """Live processes of a process group, without zombies."""
    alive = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it has just ended
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
    return alive


@dataclass
class Server:
    """A server process. `--port` is appended to `command`. `ready` is a path that answers 200 once it is ready."""

    name: str
    command: list[str]
    log: Path
    ready: str = "/health"
    start_s: float = 120
    env: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    host: str = "127.0.0.1"  # the address that `command` makes it listen on

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> Server:
        """Start the process without waiting."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(self.env),
                process_group=0,
            )
        return self

    def wait_ready(self) -> Server:
        wait_until(self.is_ready, self.start_s, f"{self.name} to answer; its log ends:\n{self.tail()}")
        return self

    def is_ready(self) -> bool:
        assert self.process is not None, f"{self.name} was never started"
        code = self.process.poll()
        assert code is None, f"{self.name} exited with {code}; its log ends:\n{self.tail()}"
        try:
            return httpx.get(self.url + self.ready, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def restart(self) -> Server:
        """Stop it if it runs, and start it again on the same port."""
        self.stop()
        return self.start().wait_ready()

    def kill9(self) -> None:
        """Send SIGKILL to the whole group and wait until all its processes have ended."""
        self._signal(signal.SIGKILL)
        self._wait_gone(10)

    def stop(self, grace_s: float = 5) -> int | None:
        """Send SIGTERM, then SIGKILL. Returns the exit status of the group's leader."""
        self._signal(signal.SIGTERM)
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        self.kill9()
        return self.process.returncode if self.process else None

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def _signal(self, number: int) -> None:
        if self.process and members(self.process.pid):
            os.killpg(self.process.pid, number)

    def _wait_gone(self, seconds: float) -> None:
        if self.process:
            group = self.process.pid
            self.process.wait(seconds)
            wait_until(lambda: not members(group), seconds, f"the processes of {self.name} to end")


class Proxy(Server):
    """`xgen-proxy serve` as a process. It chooses its own port and prints it."""

    def start(self) -> Proxy:
        self.port = 0
        super().start()
        listening = wait_until(self._listening, self.start_s, f"the proxy to listen; its log ends:\n{self.tail()}")
        self.port = int(listening.group(1))
        return self

    def _listening(self) -> re.Match[str] | None:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"the proxy exited with {code}; its log ends:\n{self.tail()}"
        return re.search(r"listening on http://127\.0\.0\.1:(\d+)", self.log.read_text(errors="replace"))


def proxy(log: Path, *args: str, env: Mapping[str, str] | None = None) -> Proxy:
    """A proxy with flags of `xgen-proxy serve`. It inherits the coverage variables, so that its coverage counts."""
    coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    command = [sys.executable, "-m", "xgen_proxy.cli", "serve", "--host", "127.0.0.1", *args]
    whatever_is_left = {"XGEN_MEMORY_GUARD__RAM_REDUCE": "1", "XGEN_MEMORY_GUARD__RAM_CLOSE": "1"}
    return Proxy("the proxy", command, log, "/ready", 30, {**whatever_is_left, **coverage, **(env or {})})


def llama_cpp_python(log: Path, model: str, *args: str) -> Server:
    """The default CPU backend. XGEN_TEST_PYTHON names another interpreter that has it installed."""
    python = os.environ.get("XGEN_TEST_PYTHON", sys.executable)
    command = [python, "-m", "llama_cpp.server", "--model", model, "--model_alias", MODEL, "--n_ctx", str(CONTEXT)]
    command += ["--n_threads", "1", "--n_threads_batch", "1", "--interrupt_requests", "false", *args]
    return Server("llama-cpp-python", [*command, "--host", "127.0.0.1"], log, "/openapi.json")


def llama_server(log: Path, model: str, *args: str, slots: int = 4, metrics: bool = True) -> Server:
    """llama.cpp's own server, started by this project's launcher."""
    command = [sys.executable, "-m", "backends.llama_cpp.llama_server", "-m", model, "-a", MODEL]
    command += ["-c", str(CONTEXT * slots), "-np", str(slots), "-t", "1", "-tb", "1", "-b", "64", "-ub", "64"]
    command += [*(["--metrics"] if metrics else []), "--slots", "--no-ui", "--offline", *args]
    return Server("llama-server", command, log)


def vllm(log: Path, executable: str, model: str, *, tools: bool = True) -> Server:
    """The CPU build of vLLM. It takes 30-100 s to start and 5 GB of memory."""
    command = [executable, "serve", model, "--served-model-name", MODEL, "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(VLLM_SLOTS)]
    if tools:
        command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    env = {
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One thread: on busy cores two threads wait for each other, and requests take twice as long.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return Server("vLLM", [*command, "--host", "127.0.0.1"], log, "/health", 420, env)
