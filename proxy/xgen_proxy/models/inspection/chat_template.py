"""Whether a chat template knows tools: it is rendered with one, in a sandbox.

A template is a program of others, which may never end or fill the memory: it runs in a process of its own with limits,
python -m xgen_proxy.models.inspection.chat_template, with the templates as JSON on stdin.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOOL = "look_up_the_tide"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "The next high tide.",
            "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}, "required": ["harbour"]},
        },
    }
]
CHAT = [{"role": "user", "content": "When is high tide in Busan?"}]
MOST_CHARACTERS = 1_000_000  # of all templates of a model; the longest known ones have 20,000
CPU_S, WALL_S, MEMORY_BYTES = 2, 20, 2**30  # of their process
# Transformers' own tag, which marks what is trained on.
GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


def knows_tools(templates: Mapping[str, str]) -> bool | None:
    """Whether a tool appears in what the model would read. None: the templates cannot be rendered."""
    if not templates:
        return False
    if sum(map(len, templates.values())) > MOST_CHARACTERS:
        return None
    command = [sys.executable, "-P", "-m", "xgen_proxy.models.inspection.chat_template"]
    given = json.dumps(list(templates.values()))
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=WALL_S, check=True)  # noqa: S603
    except subprocess.SubprocessError:
        return None
    answers = json.loads(done.stdout)
    return True if True in answers else None if None in answers else False


def _shows_tool(template: str) -> bool | None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda format: "2026-01-01"}
    try:
        compiled = environment.from_string(GENERATION.sub("", template))
        text = compiled.render(
            messages=CHAT,
            tools=TOOLS,
            add_generation_prompt=True,
            bos_token="",
            eos_token="",
        )
    except Exception:  # a program of others may fail in any way
        return None
    return TOOL in text


def _refuse(message: str) -> Any:
    raise jinja2.TemplateError(message)


def main() -> None:
    """Answers with a JSON list: true, false or null for each template. Killed when it needs more than its limits."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    json.dump([_shows_tool(template) for template in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
