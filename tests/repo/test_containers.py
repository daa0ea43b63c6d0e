"""compose.yaml, .env.example and the Dockerfiles agree with each other and with the code. Needs no Docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends import healthcheck
from backends.local import ENGINES
from tests.support.compose_stack import COMPOSE, ROOT, variables
from xgen_proxy import __version__
from xgen_proxy.config.settings import Settings

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
    unset = {"CUDA_VISIBLE_DEVICES"}  # has no default and must not be empty
    shown = {name: value for name, value in examples().items() if name not in unset | READ_BY_COMPOSE}
    assert shown == {name: value for name, value in variables().items() if name not in unset}


def test_each_setting_has_a_comment() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#[A-Z_]+=", line):
            assert re.match(r"# \w|#[A-Z_]+=", lines[number - 1]), line


def test_a_setting_has_one_default() -> None:
    found = re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.read_text())
    assert len(set(found)) == len({name for name, _ in found})


def test_the_proxys_settings_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As passed by compose, except the template, which exists only in a running stack."""
    proxy = compose()["services"]["proxy"]
    for name, value in proxy["environment"].items():
        if not name.endswith("__CHAT_TEMPLATE"):
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)))
    monkeypatch.chdir(tmp_path)
    settings = Settings()
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
