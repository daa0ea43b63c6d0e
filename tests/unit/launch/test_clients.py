"""What each client is told. tests/e2e/test_client_matrix.py runs the programs themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from xgen_proxy.launch.clients import CLIENTS, Setup
from xgen_proxy.launch.proxy import Model, Proxy

URL = "http://127.0.0.1:8080"
BIG = Model("big", 40_960, frozenset({"generation", "tools"}))
SMALL = Model("small", None, frozenset({"generation"}))


def proxy(**fields: Any) -> Proxy:
    return Proxy(**{"url": URL, "model": BIG, "models": (BIG, SMALL), **fields})


def setup(client: str, **fields: Any) -> Setup:
    return CLIENTS[client].setup(proxy(**fields))


def environment(client: str, **fields: Any) -> dict[str, str]:
    return setup(client, **fields).environment({"PATH": "/bin", "ANTHROPIC_API_KEY": "sk-ant-1"})


def test_claude_asks_the_proxy_and_nobody_else() -> None:
    assert environment("claude", key="sk-1") == {
        "PATH": "/bin",
        "ANTHROPIC_BASE_URL": URL,
        "ANTHROPIC_AUTH_TOKEN": "sk-1",
        "ANTHROPIC_DEFAULT_OPUS_MODEL": "big",
        "ANTHROPIC_DEFAULT_SONNET_MODEL": "big",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "big",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "40960",
    }


def test_claude_has_a_token_even_where_the_proxy_asks_for_none() -> None:
    assert environment("claude")["ANTHROPIC_AUTH_TOKEN"] == "none"


def test_claude_uses_an_alias_that_is_named_after_a_tier() -> None:
    aliases = Model("claude-haiku", alias_of="small"), Model("haiku-of-mine", alias_of="small")
    found = environment("claude", models=(BIG, *aliases))
    assert found["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "claude-haiku"
    assert found["ANTHROPIC_DEFAULT_OPUS_MODEL"] == "big"


@pytest.mark.parametrize(
    ("haiku", "context"), [(8192, "8192"), (99_999, "40960"), (None, "40960")], ids=["shorter", "longer", "unknown"]
)
def test_claude_compacts_by_the_shortest_context_of_its_models(haiku: int | None, context: str) -> None:
    unused = Model("small", 2048)
    found = environment("claude", models=(BIG, unused, Model("claude-haiku", haiku, alias_of="small")))
    assert found["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == context
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in environment("claude", model=SMALL)


def test_claude_settings_are_its_environment() -> None:
    kept = json.loads(setup("claude").file)["env"]
    assert kept == {name: value for name, value in environment("claude").items() if name != "PATH"}


def codex_flags(found: Setup) -> dict[str, Any]:
    """As Codex reads them: each is a line of TOML."""
    assert found.flags[::2] == ("-c",) * (len(found.flags) // 2)
    return tomllib.loads("\n".join(found.flags[1::2]))


@pytest.mark.parametrize("model", [BIG, Model('a "quoted" \\ näme 🙂'), Model("Qwen/Qwen3-8B", 8192)])
def test_codex_flags_are_its_configuration(model: Model) -> None:
    found = setup("codex", model=model)
    assert codex_flags(found) == tomllib.loads(found.file)
    kept = tomllib.loads(found.file)
    assert kept["model"] == model.id
    assert kept.get("model_context_window") == model.context
    assert kept["model_provider"] == "xgen"
    assert kept["model_providers"]["xgen"] == {
        "name": "xgen-proxy", "base_url": f"{URL}/v1", "wire_api": "responses"
    }  # fmt: skip
    assert found.variables == ()


def test_codex_settings_stand_above_those_of_the_user() -> None:
    kept = tomllib.loads(setup("codex").file + 'approval_policy = "never"\n\n[model_providers.mine]\nname = "mine"\n')
    assert kept["approval_policy"] == "never"
    assert kept["model_providers"]["mine"] == {"name": "mine"}


def test_codex_reads_the_key_from_a_variable() -> None:
    found = setup("codex", key="sk-1")
    assert "sk-1" not in found.file + "".join(found.flags)
    assert codex_flags(found)["model_providers"]["xgen"]["env_key"] == "XGEN_KEY"
    assert found.environment({}) == {"XGEN_KEY": "sk-1"}
    assert setup("codex", key="sk-1", key_is_set=True).variables == (), "the shell has it"


def test_opencode_has_every_model_with_its_context() -> None:
    found = setup("opencode", key="sk-1", models=(BIG, SMALL, Model("claude-haiku", alias_of="small")))
    config = json.loads(found.file)
    assert config == json.loads(found.environment({})["OPENCODE_CONFIG_CONTENT"])
    assert (config["model"], config["small_model"]) == ("xgen/big", "xgen/big")
    provider = config["provider"]["xgen"]
    assert provider["options"] == {"baseURL": f"{URL}/v1", "apiKey": "{env:XGEN_KEY}"}
    assert provider["models"] == {
        "big": {"name": "big", "limit": {"context": 40_960, "output": 10_240}},
        "small": {"name": "small"},
    }
    assert found.environment({})["XGEN_KEY"] == "sk-1"
    assert json.loads(setup("opencode").file)["provider"]["xgen"]["options"]["apiKey"] == "none"


def test_openwebui_has_the_proxy_and_a_port_of_its_own() -> None:
    found = setup("openwebui", key="sk-1")
    expected = {
        "OPENAI_API_BASE_URL": f"{URL}/v1",
        "OPENAI_API_KEY": "sk-1",
        "DEFAULT_MODELS": "big",
        "ENABLE_OLLAMA_API": "false",
        "ENABLE_FORWARD_USER_INFO_HEADERS": "true",
    }
    assert found.environment({}) == expected
    assert dict(line.split("=", 1) for line in found.file.splitlines()) == expected
    assert found.command == ("open-webui", "serve", "--port", "3000")
    assert any("docker run" in note and "--env-file openwebui.env" in note for note in found.notes)


@pytest.mark.parametrize("fields", [{}, {"key": "sk-1"}, {"key": "sk-1", "key_is_set": True}])
def test_the_python_script_is_python(fields: dict[str, Any]) -> None:
    found = setup("python", model=Model('a "quoted" \\ näme 🙂'), **fields)
    compile(found.file, "script", "exec")
    assert ("sk-1" in found.file) == ("key" in fields and "key_is_set" not in fields)
    assert (found.command, found.flags) == ((sys.executable,), ("-c", found.file))


def test_the_python_script_takes_its_key_from_the_environment() -> None:
    script = setup("python", key="sk-1", key_is_set=True).file.partition("stream =")[0] + "print(client.api_key)"
    done = subprocess.run([sys.executable, "-c", script], env={"XGEN_KEY": "sk-9"}, capture_output=True, text=True)
    assert done.stdout == "sk-9\n", done.stderr
