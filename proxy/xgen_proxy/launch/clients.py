"""The clients, and the settings with which each uses the proxy.

To add one: a function that makes its Setup, a line in CLIENTS, a section in docs/clients.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from xgen_proxy.launch.target import KEY_VARIABLE, Target
from xgen_proxy.values import frozen

NO_KEY = "none"  # for a client that insists on one
WEB_PORT = 3000  # Open WebUI's own default is 8080, which is the proxy's
TIERS = ("opus", "sonnet", "haiku")


@frozen
class Variable:
    """An environment variable. `value`: None to remove it. `why`: one line for people."""

    name: str
    value: str | None
    why: str


@frozen
class Setup:
    """What a client needs. `command` starts it, with `flags` that say what variables cannot. `file` says all of it as a
    file of the client's own, and `keep` where that goes."""

    variables: tuple[Variable, ...]
    command: tuple[str, ...]
    file: str
    keep: str
    flags: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    def environment(self, inherited: dict[str, str]) -> dict[str, str]:
        removed = {each.name for each in self.variables if each.value is None}
        added = {each.name: each.value for each in self.variables if each.value is not None}
        return {name: value for name, value in inherited.items() if name not in removed} | added


@frozen
class Client:
    """`install`: the command that installs its program. `tools`: it needs a model that can call them. `is_script`: a
    script is printed, not an environment."""

    name: str
    title: str
    install: str
    tools: bool
    setup: Callable[[Target], Setup]
    about: str
    is_script: bool = False


def claude(target: Target) -> Setup:
    variables = (
        Variable("ANTHROPIC_BASE_URL", target.url, "The proxy, without /v1, which Claude Code adds."),
        Variable(
            "ANTHROPIC_AUTH_TOKEN",
            target.key or NO_KEY,
            "Sent as Authorization: Bearer. Without one it asks for a login, also where the proxy asks for no key.",
        ),
        Variable("ANTHROPIC_API_KEY", None, "A key of Anthropic's would be sent to the proxy, too."),
        *(
            Variable(f"ANTHROPIC_DEFAULT_{tier.upper()}_MODEL", tier_model(target, tier), why)
            for tier, why in zip(
                TIERS,
                (
                    "What /model calls opus. An alias of the proxy can give each of the three a model and an urgency.",
                    "What it calls sonnet, its default.",
                    "What it calls haiku: titles, summaries and other small work in the background.",
                ),
                strict=True,
            )
        ),
        Variable(
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1", "No telemetry and no updates: it asks only the proxy."
        ),
        Variable(
            "CLAUDE_CODE_ATTRIBUTION_HEADER",
            "0",
            "Else its prompt begins with a block that differs in each request, which makes prefix caches useless.",
        ),
    )
    kept = {each.name: each.value for each in variables if each.value}
    return Setup(variables, ("claude",), as_json({"env": kept}), "~/.claude/settings.json")


def tier_model(target: Target, tier: str) -> str:
    """An alias that is named after the tier, such as claude-haiku, else the model."""
    named = [each.id for each in target.models if each.alias_of and each.id.startswith("claude") and tier in each.id]
    return min(named, default=target.model.id)


def codex(target: Target) -> Setup:
    root: dict[str, Any] = {"model": target.model.id, "model_provider": "xgen"}
    if target.model.context:
        root["model_context_window"] = target.model.context  # else it takes every model for one of 272,000 tokens
    provider = {"name": "xgen-proxy", "base_url": target.v1, "wire_api": "responses"}
    if target.key:
        provider["env_key"] = KEY_VARIABLE
    flags = [f"{name}={toml(value)}" for name, value in root.items()]
    flags += [f"model_providers.xgen.{name}={toml(value)}" for name, value in provider.items()]
    lines = [f"{name} = {toml(value)}" for name, value in root.items()]
    lines += ["", "[model_providers.xgen]", *(f"{name} = {toml(value)}" for name, value in provider.items())]
    return Setup(
        key_variable(target, "Codex reads the key from here and sends it as Authorization: Bearer."),
        ("codex",),
        "\n".join(lines) + "\n",
        "the top of ~/.codex/config.toml",
        tuple(word for flag in flags for word in ("-c", flag)),
        ("Codex takes its settings from a file or from flags, so `codex` becomes a function that passes them.",),
    )


def key_variable(target: Target, why: str) -> tuple[Variable, ...]:
    """None if there is no key, or the shell has it already."""
    return (Variable(KEY_VARIABLE, target.key, why),) if target.key and not target.key_is_set else ()


def toml(value: str | int) -> str:
    """JSON's strings are TOML's, too."""
    return json.dumps(value)


def opencode(target: Target) -> Setup:
    options = {"baseURL": target.v1}
    if target.key:
        options["apiKey"] = f"{{env:{KEY_VARIABLE}}}"
    shown = (target.model, *(each for each in target.models if each.alias_of is None))
    models = {each.id: opencode_model(each.id, each.context) for each in shown}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "xgen-proxy", "options": options, "models": models}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"xgen/{target.model.id}",
        "small_model": f"xgen/{target.model.id}",  # titles; else opencode may ask a model of its maker's
        "provider": {"xgen": provider},
    }
    variables = (
        *key_variable(target, "opencode reads the key from here and sends it as Authorization: Bearer."),
        Variable("OPENCODE_CONFIG_CONTENT", json.dumps(config), "Its configuration, on top of that in its files."),
    )
    return Setup(variables, ("opencode",), as_json(config), "opencode.json in your project")


def opencode_model(name: str, context: int | None) -> dict[str, Any]:
    limit = {"limit": {"context": context, "output": max(1, context // 4)}} if context else {}
    return {"name": name, **limit}


def openwebui(target: Target) -> Setup:
    variables = (
        Variable("OPENAI_API_BASE_URL", target.v1, "The proxy, with /v1."),
        Variable("OPENAI_API_KEY", target.key or NO_KEY, "Sent as Authorization: Bearer."),
        Variable("DEFAULT_MODELS", target.model.id, "The model of a new chat."),
        Variable("ENABLE_OLLAMA_API", "false", "Else it looks for an Ollama, too."),
        Variable(
            "ENABLE_FORWARD_USER_INFO_HEADERS",
            "true",
            "Tells the proxy which chat it is, so that a chat stays with the replica that has it in its cache.",
        ),
    )
    docker = (
        f"docker run --rm --network host --env-file openwebui.env -e PORT={WEB_PORT}"
        " -v open-webui:/app/backend/data openwebui/open-webui:main"
    )
    return Setup(
        variables,
        ("open-webui", "serve", "--port", str(WEB_PORT)),
        "".join(f"{each.name}={each.value}\n" for each in variables),
        "openwebui.env",
        hints=(
            f"Then http://127.0.0.1:{WEB_PORT} has it. In Docker, with the output of --config as openwebui.env:",
            f"  {docker}",
            "From its first start on Open WebUI keeps these values in its database: change them later in its own",
            "Admin Panel, under Settings and Connections.",
        ),
    )


def python(target: Target) -> Setup:
    key = f'os.environ["{KEY_VARIABLE}"]' if target.key_is_set else python_text(target.key or NO_KEY)
    script = f"""\
# Needs OpenAI's SDK: pip install openai
{"import os" + chr(10) + chr(10) if target.key_is_set else ""}from openai import OpenAI

client = OpenAI(base_url={python_text(target.v1)}, api_key={key})
stream = client.chat.completions.create(
    model={python_text(target.model.id)},
    messages=[{{"role": "user", "content": "What is the capital of France? Answer in one sentence."}}],
    max_tokens=64,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
"""
    return Setup((), (sys.executable,), script, "a file of your own", ("-c", script))


def python_text(value: str) -> str:
    """JSON's strings are Python's, too."""
    return json.dumps(value)


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


CLIENTS = {
    client.name: client
    for client in (
        Client("claude", "Claude Code", "npm install -g @anthropic-ai/claude-code", True, claude, "Anthropic's agent"),
        Client("codex", "Codex", "npm install -g @openai/codex", True, codex, "OpenAI's agent"),
        Client("opencode", "opencode", "npm install -g opencode-ai", True, opencode, "an open-source agent"),
        Client("openwebui", "Open WebUI", "pip install open-webui", False, openwebui, "a chat in the browser"),
        Client("python", "OpenAI's SDK", "pip install openai", False, python, "a script of ten lines", is_script=True),
    )
}
