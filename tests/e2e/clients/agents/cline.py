"""The command line of Cline."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.e2e.clients.client import MODEL, Client, Place, Seen
from tests.e2e.clients.installed import BIN

CLINE = str(BIN / "cline")


def run(place: Place, prompts: Sequence[str]) -> tuple[str, list[Seen]]:
    version = place.run(CLINE, "--version").stdout.split()[-1]
    return version, [ask(place, prompt) for prompt in prompts]


def ask(place: Place, prompt: str) -> Seen:
    done = place.run(CLINE, "--json", "--yolo", "--model", MODEL, prompt)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Seen(json.dumps(events) + done.stderr)


CLIENT = Client("Cline", "chat completions", run)
