"""Codex, as `codex exec` runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.e2e.clients.client import MODEL, Client, Place, Seen
from tests.e2e.clients.installed import BIN

CODEX = str(BIN / "codex")
CONFIG = """\
model = "{model}"
model_provider = "xgen"
approval_policy = "never"
sandbox_mode = "danger-full-access"

[model_providers.xgen]
name = "xgen-proxy"
base_url = "{url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


def run(place: Place, prompts: Sequence[str]) -> tuple[str, list[Seen]]:
    version = place.run(CODEX, "--version").stdout.split()[-1]
    home = place.home / ".codex"
    home.mkdir()
    (home / "config.toml").write_text(CONFIG.format(model=MODEL, url=place.url))
    return version, [ask(place, prompt) for prompt in prompts]


def ask(place: Place, prompt: str) -> Seen:
    done = place.run(CODEX, "exec", "--json", "--skip-git-repo-check", prompt)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = [event["error"]["message"] for event in events if event["type"] == "turn.failed"]
    if errors or done.returncode:
        return Seen(error="".join(errors) or done.stderr)
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    text = "".join(item["text"] for item in items if item["type"] == "agent_message")
    usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
    return Seen(text, None, (usage["input_tokens"], usage["output_tokens"]))


CLIENT = Client("Codex", "responses", run)
