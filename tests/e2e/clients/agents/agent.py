"""A coding agent: a whole program that is given a task and a folder. Each task is a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.e2e.clients.client import MODEL, Api, Client, Place, Seen
from xgen_proxy.launch.clients import CLIENTS, Setup
from xgen_proxy.launch.proxy import Model, Proxy

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Agent:
    """`command`: does a task, which comes last, without asking; with `as_json` its output is for `read`.

    `setup`: writes the agent's files, and returns the variables that it needs.
    """

    name: str
    api: Api
    command: tuple[str, ...]
    as_json: tuple[str, ...]
    setup: Callable[[Place], dict[str, str]]
    read: Callable[[Done], Seen]

    @property
    def client(self) -> Client:
        return Client(self.name, self.api, self.run)

    def run(self, place: Place, prompts: Sequence[str]) -> tuple[str, list[Seen]]:
        environment = self.setup(place)
        printed = place.run(self.command[0], "--version", **environment).stdout
        version = re.search(r"\d+\.\d+\.\d+", printed)
        assert version, printed
        return version[0], [self.ask(place, prompt, environment) for prompt in prompts]

    def ask(self, place: Place, prompt: str, environment: dict[str, str]) -> Seen:
        done = place.run(*self.command, *self.as_json, prompt, **environment)
        try:
            return self.read(done)
        except (LookupError, ValueError, StopIteration):
            return Seen(error=f"exit status {done.returncode}: {(done.stderr or done.stdout)[-500:]}")


def objects(output: str) -> list[Any]:
    """The lines that are JSON objects."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def launched(client: str, place: Place) -> Setup:
    """With what `xgen-proxy launch` starts this client."""
    model = Model(MODEL, 200_000)
    return CLIENTS[client].setup(Proxy(place.url, model, models=(model,)))
