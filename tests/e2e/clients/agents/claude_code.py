"""Claude Code, as `claude -p` runs it."""

from __future__ import annotations

from tests.e2e.clients.agents.agent import Agent, Done, objects
from tests.e2e.clients.client import MODEL, Place, Seen
from tests.e2e.clients.installed import MODULES, PLATFORM


def setup(place: Place) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": place.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_DEFAULT_OPUS_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
    }


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
