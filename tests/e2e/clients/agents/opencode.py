"""opencode, as `opencode run` runs it."""

from __future__ import annotations

import json

from tests.e2e.clients.agents.agent import Agent, Done, objects
from tests.e2e.clients.client import MODEL, Place, Seen
from tests.e2e.clients.installed import MODULES, PLATFORM


def setup(place: Place) -> dict[str, str]:
    model = {"name": "scripted", "tool_call": True, "limit": {"context": 200_000, "output": 8192}}
    options = {"baseURL": f"{place.url}/v1", "apiKey": "none"}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "xgen-proxy", "options": options, "models": {MODEL: model}}
    config = {
        "model": f"xgen/{MODEL}",
        "small_model": f"xgen/{MODEL}",
        "permission": {"edit": "allow", "external_directory": "allow"},
        "provider": {"xgen": provider},
    }
    return {
        "OPENCODE_CONFIG_CONTENT": json.dumps(config),
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
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
