"""One client of the matrix: how to run it, and what it saw."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.e2e.clients.installed import NODE

MODEL = "m"
TIMEOUT_S = 120

Api = Literal["chat completions", "messages", "responses"]


@dataclass(frozen=True)
class Seen:
    """What a client says of one task. `pieces`: of its stream, None where it does not say; `usage`: prompt, answer."""

    text: str = ""
    pieces: int | None = None
    usage: tuple[int, int] | None = None
    error: str | None = None

    @classmethod
    def of(cls, said: dict[str, Any]) -> Seen:
        usage = said.get("usage")
        return cls(said.get("text") or "", said.get("pieces"), usage and (usage[0], usage[1]), said.get("error"))


@dataclass(frozen=True)
class Place:
    """Where a client runs: the proxy's URL, the folder it works in, a home without anybody's settings, and variables
    besides its own."""

    url: str
    work: Path
    home: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def environment(self, **more: str) -> dict[str, str]:
        """Without the variables of this process, except those that programs need to start."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "HOME": str(self.home), "PYTHONDONTWRITEBYTECODE": "1", **self.variables, **more}

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.work,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )


@dataclass(frozen=True)
class Client:
    """`run`: does the prompts in order, and returns the client's version and what it saw of each."""

    name: str
    api: Api
    run: Callable[[Place, Sequence[str]], tuple[str, list[Seen]]]


def python(name: str, api: Api, program: str, interpreter: str = sys.executable) -> Client:
    """`interpreter`: that of this process has openai and LangChain."""
    return Client(name, api, lambda place, prompts: sdk(place, prompts, interpreter, str(PROGRAMS / program)))


def node(name: str, api: Api, program: str) -> Client:
    executable = shutil.which("node") or "node"
    return Client(name, api, lambda place, prompts: sdk(place, prompts, executable, str(NODE / program)))


PROGRAMS = Path(__file__).parent / "python"


def sdk(place: Place, prompts: Sequence[str], *program: str) -> tuple[str, list[Seen]]:
    """A program of python/ or node/, which does all tasks and prints what it saw."""
    done = place.run(*program, place.url, MODEL, json.dumps(list(prompts)))
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    return said["version"], [Seen.of(each) for each in said["seen"]]
