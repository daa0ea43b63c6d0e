"""The demonstration: an agent is in the middle of a task when the GPU's engine is killed, and its task is done anyway.

The agents, the proxy and SIGKILL are real; the engines are processes whose words are scripted. To record it again as
docs/agents.svg:

python -m tests.e2e.clients.demonstration
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.clients.agents.agent import Agent
from tests.e2e.clients.agents.claude_code import CLAUDE_CODE
from tests.e2e.clients.agents.codex import CODEX
from tests.e2e.clients.client import Place
from tests.e2e.clients.installed import install_node
from tests.e2e.clients.matrix import CONTEXT
from tests.e2e.clients.scripted_model import TASK
from tests.e2e.clients.terminal import Line, svg
from tests.support.documents import ROOT
from tests.support.real_servers import Proxy, Server, proxy

AGENTS = (CLAUDE_CODE, CODEX)
PICTURE = ROOT / "docs" / "agents.svg"
WORD = "hello"
SHOWN = {CLAUDE_CODE: "claude -p", CODEX: "codex exec"}


@dataclass(frozen=True)
class Session:
    """One agent's task. `gpu_status`: of the GPU's engine; a negative number is the signal that ended it."""

    agent: Agent
    status: int
    gpu_status: int | None
    written: str
    log: list[dict[str, object]]  # of the proxy
    lines: list[Line]

    @property
    def printed(self) -> str:
        return "\n".join(line.text for line in self.lines if line.kind == "output")


@contextmanager
def fleet(folder: Path) -> Iterator[tuple[Proxy, Server]]:
    """A proxy in front of two engines, of which the GPU's kills itself while it writes the word."""
    gpu, cpu = engine("vllm", folder, "--dies-writing", WORD), engine("llama-server", folder)
    flags = ["--vllm", gpu.url, "--llama-cpp", cpu.url, "--engine", "llama-server"]
    settings = {
        "XGEN_BACKENDS__VLLM__CONTEXT": str(CONTEXT),
        "XGEN_BACKENDS__LLAMA_CPP__CONTEXT": str(CONTEXT),
        "XGEN_BACKENDS__LLAMA_CPP__TOOLS": "true",
        "XGEN_LOG_FORMAT": "json",
    }
    front = proxy(folder / "proxy.log", *flags, env=settings)
    try:
        for server in (gpu, cpu, front):
            server.start().wait_ready()
        yield front, gpu
    finally:
        for server in (front, gpu, cpu):
            server.stop()


def engine(name: str, folder: Path, *flags: str) -> Server:
    command = [sys.executable, "-m", "tests.e2e.clients.scripted_model", *flags]
    return Server(name, command, folder / f"{name}.log", start_s=30)


def play(agent: Agent, folder: Path) -> Session:
    with fleet(folder) as (front, gpu):
        place = Place(front.url, folder / "work", folder / "home")
        place.work.mkdir()
        place.home.mkdir()
        path = place.work / f"{WORD}.txt"
        task = TASK.format(line=WORD, path=path)
        lines = [Line(0, "typed", f"$ {SHOWN[agent]} '{TASK.format(line=WORD, path=path.name)}'")]
        status = watched(place, agent, task, gpu, lines)
        assert gpu.process is not None
        written = path.read_text() if path.exists() else ""
        log = [json.loads(line) for line in front.log.read_text().splitlines() if line.startswith("{")]
        return Session(agent, status, gpu.process.poll(), written, log, lines)


def watched(place: Place, agent: Agent, task: str, gpu: Server, lines: list[Line]) -> int:
    """Runs the agent, and adds what it prints and the end of the engine to `lines`. Returns the agent's exit status."""
    began = time.monotonic()
    child = subprocess.Popen(
        [*agent.command, task],
        cwd=place.work,
        env=place.environment(**agent.setup(place)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the agents' remarks on a model that they do not know
        text=True,
    )

    ended: list[float] = []

    def watch() -> None:
        assert gpu.process is not None
        gpu.process.wait()
        ended.append(time.monotonic() - began)

    threading.Thread(target=watch, daemon=True).start()
    assert child.stdout is not None
    seen = [Line(time.monotonic() - began, "output", text.rstrip()) for text in child.stdout]
    seen += [Line(second, "killed", "vllm: Killed (SIGKILL), in the middle of a tool call") for second in ended]
    lines += sorted(seen, key=lambda line: line.second)
    return child.wait()


def drawn(sessions: list[Session]) -> str:
    """The sessions, one after the other, with pauses to read."""
    lines: list[Line] = []
    start = 0.0
    for session in sessions:
        lines += [Line(start + line.second, line.kind, line.text) for line in session.lines]
        start = lines[-1].second + 1
        lines += [Line(start, "typed", f"$ cat {WORD}.txt"), Line(start, "good", session.written.strip())]
        lines.append(Line(start + 1, "output", ""))
        start += 2
    return svg("The GPU's engine is killed in the middle of a task", lines)


def main() -> None:
    install_node()
    sessions = []
    for agent in AGENTS:
        with tempfile.TemporaryDirectory() as folder:
            sessions.append(play(agent, Path(folder)))
    PICTURE.write_text(drawn(sessions))


if __name__ == "__main__":
    main()
