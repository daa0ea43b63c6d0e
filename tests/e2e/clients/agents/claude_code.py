"""Claude Code, as `claude -p` runs it."""

from __future__ import annotations

from tests.e2e.clients.agents.agent import Agent, Done, launched, objects
from tests.e2e.clients.client import Place, Seen
from tests.e2e.clients.installed import MODULES, PLATFORM


def setup(place: Place) -> dict[str, str]:
    return launched("claude", place).environment({"CLAUDE_CODE_MAX_RETRIES": "0"})


def read(done: Done) -> Seen:
    result = objects(done.stdout)[-1]
    if result["is_error"]:
        return Seen(error=result["result"])
    usage = result["usage"]
    return Seen(result["result"], None, (usage["input_tokens"], usage["output_tokens"]))


CLAUDE_CODE = Agent(
    "Claude Code",
    "messages",
    (str(MODULES / "@anthropic-ai" / f"claude-code-{PLATFORM}" / "claude"), "--allowedTools=Write", "-p"),
    ("--output-format", "json"),
    setup,
    read,
)
