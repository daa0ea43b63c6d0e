"""The lines are evaluated by a real sh."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from xgen_proxy.launch import shell
from xgen_proxy.launch.clients import CLIENTS
from xgen_proxy.launch.proxy import Model, Proxy

HOSTILE = """it's "$(touch pwned)" `touch pwned` ; touch pwned # \\ $HOME ${x} ! * é"""
CLIENT_NAMES = [name for name, client in CLIENTS.items() if not client.is_script]


def evaluated(script: str, folder: Path, then: str = "env -0", **variables: str) -> dict[str, str]:
    """The environment after the script, in an empty folder that it must leave empty."""
    environment = {"PATH": "/usr/bin:/bin", "ANTHROPIC_API_KEY": "sk-ant-1", **variables}
    command = ["sh", "-euc", f'eval "$0"; {then}', script]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert list(folder.iterdir()) == []
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


@pytest.mark.parametrize("name", CLIENT_NAMES)
@pytest.mark.parametrize("model", ["smollm2", "Qwen/Qwen3-8B", HOSTILE])
def test_sh_reads_the_values_as_they_are(name: str, model: str, tmp_path: Path) -> None:
    proxy = Proxy("http://127.0.0.1:8080", Model(model, 2048), "sk-it's")
    client = CLIENTS[name]
    setup = client.setup(proxy)
    found = evaluated(shell.script(client, proxy, setup, f"xgen-proxy launch {name}"), tmp_path)
    expected = setup.environment({"ANTHROPIC_API_KEY": "sk-ant-1"})
    assert expected
    assert {variable: found.get(variable) for variable in expected} == expected
    assert ("ANTHROPIC_API_KEY" in found) == (name != "claude")


@pytest.mark.parametrize("name", CLIENT_NAMES)
def test_a_key_that_the_shell_has_is_not_shown(name: str, tmp_path: Path) -> None:
    proxy = Proxy("http://127.0.0.1:8080", Model("m"), "sk-secret", key_is_set=True)
    client = CLIENTS[name]
    script = shell.script(client, proxy, client.setup(proxy), f"xgen-proxy launch {name}")
    assert "sk-secret" not in script
    found = evaluated(script, tmp_path, XGEN_KEY="sk-secret")
    wanted = {"claude": "ANTHROPIC_AUTH_TOKEN", "openwebui": "OPENAI_API_KEY"}.get(name, "XGEN_KEY")
    assert found[wanted] == "sk-secret"


def test_flags_become_a_function(tmp_path: Path) -> None:
    """`codex exec "two words"` passes our flags first."""
    proxy = Proxy("http://127.0.0.1:8080", Model(HOSTILE))
    client = CLIENTS["codex"]
    setup = client.setup(proxy)
    script = shell.script(client, proxy, setup, "xgen-proxy launch codex")
    program = tmp_path / "bin" / "codex"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    command = ["sh", "-euc", 'eval "$0"; codex exec "two words"', script]
    done = subprocess.run(command, env={"PATH": f"{program.parent}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert tuple(done.stdout.split("\0")[:-1]) == (*setup.flags, "exec", "two words"), done.stderr


def test_the_comments_teach(tmp_path: Path) -> None:
    proxy = Proxy("http://127.0.0.1:8080", Model("m", 32_768))
    client = CLIENTS["claude"]
    script = shell.script(client, proxy, client.setup(proxy), "xgen-proxy launch claude")
    first, now, once, kept, *_ = script.splitlines()
    assert first == "# Claude Code with the proxy at http://127.0.0.1:8080 and the model m (32,768 tokens)."
    assert now.endswith('eval "$(xgen-proxy launch claude)" && claude')
    assert once.endswith("xgen-proxy launch claude --run")
    assert "xgen-proxy launch claude --config" in kept
    lines = script.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("export", "unset")):
            assert lines[number - 1].startswith("# ")
