"""Whether a chat template knows tools: it is rendered with one, in a sandbox."""

from __future__ import annotations

import re
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
# Transformers' own tag, which marks what is trained on.
GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


def knows_tools(templates: Mapping[str, str]) -> bool | None:
    """Whether a tool appears in what the model would read. None: the templates cannot be rendered."""
    answers = [_shows_tool(template) for template in templates.values()]
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
    except Exception:  # a template is a program of others: it may fail in any way
        return None
    return TOOL in text


def _refuse(message: str) -> Any:
    raise jinja2.TemplateError(message)
