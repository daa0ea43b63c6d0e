"""opencode, as `opencode run` runs it."""

from __future__ import annotations

import json

from tests.e2e.clients.agents.agent import Agent, Done, launched, objects
from tests.e2e.clients.client import Place, Seen
from tests.e2e.clients.installed import MODULES, PLATFORM


def setup(place: Place) -> dict[str, str]:
    settings = launched("opencode", place).environment({})
    config = json.loads(settings["OPENCODE_CONFIG_CONTENT"])
    config["permission"] = {"edit": "allow", "external_directory": "allow"}
    return {
        **settings,
        "OPENCODE_CONFIG_CONTENT": json.dumps(config),
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    }


def read(done: Done) -> Seen:
    events = objects(done.stdout)
    for event in events:
        if event["type"] == "error":
            return Seen(error=json.dumps(event["error"]))
    text = "".join(event["part"]["text"] for event in events if event["type"] == "text")
    steps = [event["part"]["tokens"] for event in events if event["type"] == "step_finish"]
    return Seen(text, None, (steps[-1]["input"], steps[-1]["output"]))


PROGRAM = str(MODULES / f"opencode-{PLATFORM}" / "bin" / "opencode")
OPENCODE = Agent("opencode", "chat completions", (PROGRAM, "run"), ("--format", "json"), setup, read)
