"""Codex, as `codex exec` runs it."""

from __future__ import annotations

from tests.e2e.clients.agents.agent import Agent, Done, launched, objects
from tests.e2e.clients.client import Place, Seen
from tests.e2e.clients.installed import BIN

# In a file of the user's own, below what `launch --config` prints.
CONFIG = """\
approval_policy = "never"
sandbox_mode = "danger-full-access"
model_providers.xgen.request_max_retries = 0
model_providers.xgen.stream_max_retries = 0
"""


def setup(place: Place) -> dict[str, str]:
    home = place.home / "codex"
    home.mkdir()
    (home / "config.toml").write_text(launched("codex", place).file + CONFIG)
    return {"CODEX_HOME": str(home)}


def read(done: Done) -> Seen:
    events = objects(done.stdout)
    for event in events:
        if event["type"] == "turn.failed":
            return Seen(error=event["error"]["message"])
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    text = "".join(item["text"] for item in items if item["type"] == "agent_message")
    usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
    return Seen(text, None, (usage["input_tokens"], usage["output_tokens"]))


CODEX = Agent("Codex", "responses", (str(BIN / "codex"), "exec", "--skip-git-repo-check"), ("--json",), setup, read)
