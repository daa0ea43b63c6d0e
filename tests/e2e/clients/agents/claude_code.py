"""Claude Code, as `claude -p` runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.e2e.clients.client import MODEL, Client, Place, Seen
from tests.e2e.clients.installed import BIN

CLAUDE = str(BIN / "claude")


def run(place: Place, prompts: Sequence[str]) -> tuple[str, list[Seen]]:
    version = place.run(CLAUDE, "--version").stdout.split()[0]
    return version, [ask(place, prompt) for prompt in prompts]


def ask(place: Place, prompt: str) -> Seen:
    done = place.run(
        CLAUDE, "-p", prompt, "--output-format", "json", "--allowedTools", "Write",
        ANTHROPIC_BASE_URL=place.url,
        ANTHROPIC_AUTH_TOKEN="none",
        ANTHROPIC_MODEL=MODEL,
        ANTHROPIC_DEFAULT_HAIKU_MODEL=MODEL,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        CLAUDE_CODE_MAX_RETRIES="0",
    )  # fmt: skip
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return Seen(error=done.stdout + done.stderr)
    if result["is_error"]:
        return Seen(error=result["result"])
    usage = result["usage"]
    return Seen(result["result"], None, (usage["input_tokens"], usage["output_tokens"]))


CLIENT = Client("Claude Code", "messages", run)
