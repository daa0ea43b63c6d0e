"""compose.yaml, .env.example and the Dockerfiles agree with each other and with the code. Needs no Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values

from backends import healthcheck
from backends.local import ENGINES
from tests.support.compose_stack import COMPOSE, ROOT, variables
from tests.support.real_servers import clean_environment
from xgen_proxy import __version__
from xgen_proxy.api.api_keys import hash_key
from xgen_proxy.config.loading import ConfigError, ConfigSources
from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.registry import DIALECTS

EXAMPLE = ROOT / ".env.example"
DOCKERFILES = [ROOT / "proxy" / "Dockerfile", ROOT / "backends" / "llama_cpp" / "Dockerfile"]
READ_BY_COMPOSE = {"COMPOSE_PROFILES"}


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text()))


def examples() -> dict[str, str]:
    return dict(re.findall(r"(?m)^#([A-Z_]+)=(.*)$", EXAMPLE.read_text()))


def test_the_example_lists_every_setting() -> None:
    assert set(examples()) - READ_BY_COMPOSE == set(variables())


def test_the_example_shows_the_defaults() -> None:
    unset = {"CUDA_VISIBLE_DEVICES", "XGEN_API_KEYS"}  # have no default and must not be empty
    shown = {name: value for name, value in examples().items() if name not in unset | READ_BY_COMPOSE}
    assert shown == {name: value for name, value in variables().items() if name not in unset}


def test_each_setting_has_a_comment() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#[A-Z_]+=", line):
            assert re.match(r"# \w|#[A-Z_]+=", lines[number - 1]), line


def test_the_example_says_how_many_requests_wait_in_vllm() -> None:
    assert f"sends up to {DIALECTS['vllm'].overcommit} more" in EXAMPLE.read_text()


def test_a_setting_has_one_default() -> None:
    found = re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text())
    assert len(set(found)) == len({name for name, _ in found})


def test_the_proxys_settings_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As passed by compose, except the template, which exists only in a running stack."""
    proxy = compose()["services"]["proxy"]
    for name, value in proxy["environment"].items():
        if not name.endswith(("__CHAT_TEMPLATE", "_API_KEYS")):
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="api_keys: none are set"):
        ConfigSources().load()
    monkeypatch.setenv("XGEN_API_KEYS", "none")
    settings = ConfigSources().load()
    assert {name: each.dialect for name, each in settings.backends.items()} == {
        "vllm": "vllm",
        "llama_cpp": "llama-cpp-python",
    }
    assert all(secret in {f"xgen_{name}" for name in Settings.model_fields} for secret in proxy["secrets"])


def test_each_engine_has_an_image() -> None:
    stages = re.findall(r"(?m)^FROM \S+ AS (\S+)$", DOCKERFILES[1].read_text())
    assert set(ENGINES) <= set(stages)
    assert set(healthcheck.HEALTH_PATHS) == set(ENGINES)


def test_llama_cpp_is_built_for_a_fixed_cpu() -> None:
    text = DOCKERFILES[1].read_text()
    assert "-DGGML_NATIVE=OFF" in text
    assert "-DGGML_AVX512=OFF" in text


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    final = text.rpartition("\nFROM ")[2] if dockerfile.parent.name == "proxy" else text
    assert "USER 10001:10001" in final
    assert set(re.findall(r'image\.version="([^"]+)"', text)) == {__version__}
    for install in re.findall(r"pip (?:install|wheel) [^\n\\]*-r \S+", text):
        assert "--require-hashes" in install, install
    assert "--mount" not in text, "the classic builder, used without buildx, has no --mount"


# make up

NO_DOCKER = """#!/bin/sh
case "$*" in *port*) echo 127.0.0.1:443 ;; esac
"""


def make_up(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run deploy/up.sh in a copy of what it needs, with a docker that does nothing."""
    for file in ("deploy/up.sh", ".env.example", "bin/docker"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(NO_DOCKER if file == "bin/docker" else (ROOT / file).read_text())
    (folder / "bin" / "docker").chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(folder / "deploy" / "up.sh")]
    return subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True, check=False)


def test_make_up_makes_a_key_for_a_new_env_file(tmp_path: Path) -> None:
    done = make_up(tmp_path)
    assert done.returncode == 0, done.stderr
    [key, shown_again] = re.findall(r"sk-[\w-]{43}", done.stdout)
    assert key == shown_again, "in the command to try"
    written = dotenv_values(tmp_path / ".env")
    assert written == {"XGEN_API_KEYS": hash_key(key)}
    assert key not in (tmp_path / ".env").read_text()
    again = make_up(tmp_path)
    assert again.returncode == 0
    assert "sk-" not in again.stdout
    assert "-H 'Authorization: Bearer KEY'" in again.stdout
    assert dotenv_values(tmp_path / ".env") == written


@pytest.mark.parametrize("text", ["", "XGEN_API_KEYS=\n", "#XGEN_API_KEYS=none\nBIND=0.0.0.0\n"])
def test_make_up_refuses_an_env_file_that_does_not_speak_of_keys(tmp_path: Path, text: str) -> None:
    (tmp_path / ".env").write_text(text)
    done = make_up(tmp_path)
    assert done.returncode == 1
    assert "XGEN_API_KEYS=none" in done.stderr
    assert make_up(tmp_path, XGEN_API_KEYS="none").returncode == 0
    (tmp_path / ".env").write_text(text + "API_KEYS_FILE=./keys\n")
    assert make_up(tmp_path).returncode == 0


def test_make_up_asks_for_no_key_where_none_is_said(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("XGEN_API_KEYS=none\n")
    done = make_up(tmp_path)
    assert done.returncode == 0
    assert "Authorization" not in done.stdout


def test_make_up_says_what_a_vllm_on_another_machine_needs(tmp_path: Path) -> None:
    settings = "XGEN_API_KEYS=none\nVLLM_URL=http://gpu-host:8000\n"
    (tmp_path / ".env").write_text(settings)
    done = make_up(tmp_path)
    assert done.returncode == 1
    needed = done.stderr.splitlines()[-1]
    assert (ROOT / needed.partition(":")[2]).is_file(), needed
    (tmp_path / ".env").write_text(settings + needed + "\n")
    assert make_up(tmp_path).returncode == 0


def test_the_backends_image_has_what_its_programs_import(tmp_path: Path) -> None:
    """The image has a part of the proxy's package only: what fetches models."""
    dockerfile = (ROOT / "backends" / "llama_cpp" / "Dockerfile").read_text()
    for *sources, target in (line.split() for line in re.findall(r"(?m)^COPY ((?!--|requirements).+)$", dockerfile)):
        for source in sources:
            whole = (ROOT / source).is_dir()
            into = tmp_path / target if whole else tmp_path / target / Path(source).name
            (shutil.copytree if whole else copied)(ROOT / source, into)
    programs = "backends.llama_cpp.container, backends.models, backends.healthcheck"
    # Without coverage, which would count the copy as modules that no test runs.
    here = clean_environment({"PYTHONPATH": f"{tmp_path}:{tmp_path / 'proxy'}"})
    done = subprocess.run(
        [sys.executable, "-c", f"import {programs}, xgen_proxy; print(xgen_proxy.__file__)"],
        cwd=tmp_path, env=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
