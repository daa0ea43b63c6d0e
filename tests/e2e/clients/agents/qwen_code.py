"""qwen-code, as `qwen -p` runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.e2e.clients.client import MODEL, Client, Place, Seen
from tests.e2e.clients.installed import BIN

QWEN = str(BIN / "qwen")


def run(place: Place, prompts: Sequence[str]) -> tuple[str, list[Seen]]:
    version = place.run(QWEN, "--version").stdout.strip()
    return version, [ask(place, prompt) for prompt in prompts]


def ask(place: Place, prompt: str) -> Seen:
    done = place.run(
        QWEN, "-p", prompt, "--output-format", "json", "--approval-mode", "yolo", "--auth-type", "openai",
        OPENAI_BASE_URL=f"{place.url}/v1",
        OPENAI_API_KEY="none",
        OPENAI_MODEL=MODEL,
    )  # fmt: skip
    try:
        result = json.loads(done.stdout)[-1]
    except (IndexError, json.JSONDecodeError):
        return Seen(error=done.stdout + done.stderr)
    if result["is_error"]:
        return Seen(error=json.dumps(result.get("error") or result.get("result")))
    usage = result["usage"]
    return Seen(result["result"], None, (usage["input_tokens"], usage["output_tokens"]))


CLIENT = Client("qwen-code", "chat completions", run)
