"""opencode, as `opencode run` runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.e2e.clients.client import MODEL, Client, Place, Seen
from tests.e2e.clients.installed import BIN

OPENCODE = str(BIN / "opencode")


def run(place: Place, prompts: Sequence[str]) -> tuple[str, list[Seen]]:
    version = place.run(OPENCODE, "--version").stdout.strip()
    return version, [ask(place, prompt) for prompt in prompts]


def ask(place: Place, prompt: str) -> Seen:
    done = place.run(
        OPENCODE, "run", "--format", "json", prompt,
        OPENCODE_CONFIG_CONTENT=json.dumps(config(place.url)),
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
    )  # fmt: skip
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = [json.dumps(event["error"]) for event in events if event["type"] == "error"]
    if errors or done.returncode:
        return Seen(error="".join(errors) or done.stderr)
    text = "".join(event["part"]["text"] for event in events if event["type"] == "text")
    steps = [event["part"]["tokens"] for event in events if event["type"] == "step_finish"]
    return Seen(text, None, (steps[-1]["input"], steps[-1]["output"]) if steps else None)


def config(url: str) -> object:
    model = {"name": "scripted", "tool_call": True, "limit": {"context": 200_000, "output": 8192}}
    options = {"baseURL": f"{url}/v1", "apiKey": "none"}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "xgen-proxy", "options": options, "models": {MODEL: model}}
    return {
        "model": f"xgen/{MODEL}",
        "small_model": f"xgen/{MODEL}",
        "permission": {"edit": "allow", "external_directory": "allow"},
        "provider": {"xgen": provider},
    }


CLIENT = Client("opencode", "chat completions", run)
