"""The command line of Cline."""

from __future__ import annotations

from tests.e2e.clients.agents.agent import Agent, Done, objects
from tests.e2e.clients.client import MODEL, Place, Seen
from tests.e2e.clients.installed import BIN


def setup(place: Place) -> dict[str, str]:
    return {}


def read(done: Done) -> Seen:
    return Seen(str(objects(done.stdout)[-1]))


CLINE = Agent("Cline", "chat completions", (str(BIN / "cline"), "--yolo", "--model", MODEL), ("--json",), setup, read)
