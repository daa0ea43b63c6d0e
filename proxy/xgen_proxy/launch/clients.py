"""The clients, and the settings with which each uses the proxy.

To add one: a function that makes its Setup, a line in CLIENTS, a section in docs/clients.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from xgen_proxy.launch.proxy import KEY_VARIABLE, Proxy
from xgen_proxy.values import frozen

NO_KEY = "none"  # for a client that insists on one
WEB_PORT = 3000  # Open WebUI's own default is 8080, which is the proxy's
FAMILIES = ("opus", "sonnet", "haiku")


@frozen
class Variable:
    """An environment variable. `value`: None to remove it. `why`: one line for people."""

    name: str
    value: str | None
    why: str


@frozen
class Setup:
    """What a client needs. `command` and `flags` start it. `file`: the same as its own configuration file, to be put at
    `keep`. `notes`: lines for people."""

    variables: tuple[Variable, ...]
    command: tuple[str, ...]
    file: str
    keep: str
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
    setup: Callable[[Proxy], Setup]
    about: str
    is_script: bool = False


def claude(proxy: Proxy) -> Setup:
    variables = [
        Variable("ANTHROPIC_BASE_URL", proxy.url, "The proxy, without /v1, which Claude Code adds."),
        Variable(
            "ANTHROPIC_AUTH_TOKEN",
            proxy.key or NO_KEY,
            "Sent as Authorization: Bearer. Without one it asks for a login, even where the proxy asks for no key.",
        ),
        Variable("ANTHROPIC_API_KEY", None, "A key of Anthropic's would be sent to the proxy, too."),
        *(
            Variable(f"ANTHROPIC_DEFAULT_{family.upper()}_MODEL", family_model(proxy, family), why)
            for family, why in zip(
                FAMILIES,
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
    ]
    if context := shortest_context(proxy):
        why = "Else it assumes 1,000,000 tokens for a model that it does not know, and compacts too late."
        variables.append(Variable("CLAUDE_CODE_MAX_CONTEXT_TOKENS", str(context), why))
    kept = {each.name: each.value for each in variables if each.value}
    return Setup(tuple(variables), ("claude",), as_json({"env": kept}), "~/.claude/settings.json")


def family_model(proxy: Proxy, family: str) -> str:
    """An alias that is named after the family, such as claude-haiku, else the model."""
    named = [each.id for each in proxy.models if each.alias_of and each.id.startswith("claude") and family in each.id]
    return min(named, default=proxy.model.id)


def shortest_context(proxy: Proxy) -> int | None:
    """Of the models of all families, in tokens; None if none is known."""
    used = {family_model(proxy, family) for family in FAMILIES}
    return min(
        (each.context for each in (proxy.model, *proxy.models) if each.id in used and each.context), default=None
    )


def codex(proxy: Proxy) -> Setup:
    root: dict[str, Any] = {"model": proxy.model.id, "model_provider": "xgen"}
    if proxy.model.context:
        root["model_context_window"] = proxy.model.context  # else it takes every model for one of 272,000 tokens
    provider = {"name": "xgen-proxy", "base_url": proxy.v1, "wire_api": "responses"}
    if proxy.key:
        provider["env_key"] = KEY_VARIABLE
    # Keys with dots, not a table: what follows them in a file stays at the root.
    settings = root | {f"model_providers.xgen.{name}": value for name, value in provider.items()}
    return Setup(
        key_variable(proxy, "Codex reads the key from here and sends it as Authorization: Bearer."),
        ("codex",),
        "".join(f"{name} = {toml(value)}\n" for name, value in settings.items()),
        "the top of ~/.codex/config.toml, instead of `model` and `model_provider` there",
        tuple(word for name, value in settings.items() for word in ("-c", f"{name}={toml(value)}")),
        ("Codex takes its settings from a file or from flags, so `codex` becomes a function that passes them.",),
    )


def key_variable(proxy: Proxy, why: str) -> tuple[Variable, ...]:
    """None if there is no key, or the shell has it already."""
    return (Variable(KEY_VARIABLE, proxy.key, why),) if proxy.key and not proxy.key_is_set else ()


def toml(value: str | int) -> str:
    """JSON's strings are TOML's, too."""
    return json.dumps(value)


def opencode(proxy: Proxy) -> Setup:
    options = {"baseURL": proxy.v1, "apiKey": f"{{env:{KEY_VARIABLE}}}" if proxy.key else NO_KEY}
    shown = (proxy.model, *(each for each in proxy.models if each.alias_of is None))
    models = {each.id: opencode_model(each.id, each.context) for each in shown}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "xgen-proxy", "options": options, "models": models}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"xgen/{proxy.model.id}",
        "small_model": f"xgen/{proxy.model.id}",  # titles; else opencode may ask a model of its maker's
        "provider": {"xgen": provider},
    }
    variables = (
        *key_variable(proxy, "opencode reads the key from here and sends it as Authorization: Bearer."),
        Variable("OPENCODE_CONFIG_CONTENT", json.dumps(config), "Its configuration, on top of that in its files."),
        Variable("OPENCODE_DISABLE_MODELS_FETCH", "1", "Else it fetches a list of models from its vendor."),
    )
    return Setup(variables, ("opencode",), as_json(config), "opencode.json in your project")


def opencode_model(name: str, context: int | None) -> dict[str, Any]:
    limit = {"limit": {"context": context, "output": max(1, context // 4)}} if context else {}
    return {"name": name, **limit}


def openwebui(proxy: Proxy) -> Setup:
    variables = (
        Variable("OPENAI_API_BASE_URL", proxy.v1, "The proxy, with /v1."),
        Variable("OPENAI_API_KEY", proxy.key or NO_KEY, "Sent as Authorization: Bearer."),
        Variable("DEFAULT_MODELS", proxy.model.id, "The model of a new chat."),
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
        notes=(
            f"Then http://127.0.0.1:{WEB_PORT} has it. In Docker, with the output of --config as openwebui.env:",
            f"  {docker}",
            "From its first start on Open WebUI keeps these values in its database: change them later in its own",
            "Admin Panel, under Settings and Connections.",
        ),
    )


def python(proxy: Proxy) -> Setup:
    key = f'os.environ["{KEY_VARIABLE}"]' if proxy.key_is_set else python_text(proxy.key or NO_KEY)
    script = f"""\
# Needs OpenAI's SDK: pip install openai
{"import os" + chr(10) + chr(10) if proxy.key_is_set else ""}from openai import OpenAI

client = OpenAI(base_url={python_text(proxy.v1)}, api_key={key})
stream = client.chat.completions.create(
    model={python_text(proxy.model.id)},
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
