"""The demonstration: an agent is in the middle of a task when the GPU's engine is killed, and its task is done anyway.

The agents, the proxy and SIGKILL are real; the engines are processes with scripted words. What it records is drawn as
docs/agents.svg:

python -m tests.e2e.clients.demonstration
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.clients.agents import claude_code, codex
from tests.e2e.clients.client import Client, Place, Seen
from tests.e2e.clients.matrix import CONTEXT
from tests.e2e.clients.scripted_model import TASK
from tests.support.documents import ROOT
from tests.support.real_servers import Proxy, Server, proxy

AGENTS = (claude_code.CLIENT, codex.CLIENT)
PICTURE = ROOT / "docs" / "agents.svg"
LINE = "hello"


@dataclass
class Session:
    """What was seen of one agent's task, each line with the second in which it was seen."""

    client: Client
    seen: Seen
    written: str
    gpu_status: int | None  # negative: the signal that ended it
    lines: list[tuple[float, str, str]] = field(default_factory=list)  # second, who, what


@contextmanager
def fleet(folder: Path) -> Iterator[tuple[Proxy, Server]]:
    """A proxy in front of two engines, of which the GPU's kills itself while it writes the line."""
    gpu = engine("vllm", folder, "--dies-writing", LINE)
    cpu = engine("llama-server", folder)
    flags = ["--vllm", gpu.url, "--llama-cpp", cpu.url, "--engine", "llama-server"]
    settings = {
        "XGEN_BACKENDS__VLLM__CONTEXT": str(CONTEXT),
        "XGEN_BACKENDS__LLAMA_CPP__CONTEXT": str(CONTEXT),
        "XGEN_BACKENDS__LLAMA_CPP__TOOLS": "true",
    }
    front = proxy(folder / "proxy.log", *flags, env=settings)
    servers = gpu, cpu, front
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        yield front, gpu
    finally:
        for server in servers:
            server.stop()


def engine(name: str, folder: Path, *flags: str) -> Server:
    command = [sys.executable, "-m", "tests.e2e.clients.scripted_model", *flags]
    return Server(name, command, folder / f"{name}.log", start_s=30)


def play(client: Client, folder: Path) -> Session:
    with fleet(folder) as (front, gpu):
        place = Place(front.url, folder / "work", folder / "home")
        place.work.mkdir()
        place.home.mkdir()
        path = place.work / f"{LINE}.txt"
        _, [seen] = client.run(place, [TASK.format(line=LINE, path=path)])
        assert gpu.process is not None
        return Session(client, seen, path.read_text() if path.exists() else "", gpu.process.poll())
