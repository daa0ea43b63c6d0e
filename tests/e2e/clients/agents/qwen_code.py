"""qwen-code, as `qwen -p` runs it."""

from __future__ import annotations

import json

from tests.e2e.clients.agents.agent import Agent, Done
from tests.e2e.clients.client import MODEL, Place, Seen
from tests.e2e.clients.installed import BIN


def setup(place: Place) -> dict[str, str]:
    return {"OPENAI_BASE_URL": f"{place.url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": MODEL}


def read(done: Done) -> Seen:
    result = json.loads(done.stdout)[-1]
    if result["is_error"]:
        return Seen(error=json.dumps(result.get("error") or result.get("result")))
    usage = result["usage"]
    return Seen(result["result"], None, (usage["input_tokens"], usage["output_tokens"]))


QWEN_CODE = Agent(
    "qwen-code",
    "chat completions",
    (str(BIN / "qwen"), "--auth-type", "openai", "--approval-mode", "yolo"),
    ("--output-format", "json", "-p"),
    setup,
    read,
)
