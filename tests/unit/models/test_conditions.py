"""conditions(): what a result file says about its run."""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from xgen_proxy.models import conditions
from xgen_proxy.models.conditions import machine, versions


def test_a_command_can_be_typed_again() -> None:
    found = conditions.conditions(["xgen-proxy", "models", "compare", "a b.gguf"], ["httpx"])
    assert found["command"] == "xgen-proxy models compare 'a b.gguf'"
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is not None
    assert set(found["versions"]) == {"python", "httpx"}


def test_passwords_are_left_out() -> None:
    found = conditions.conditions(["distance", "http://me:p@ss@gpu:8000/v1", "https://key@cpu", "hf:a/b@main"])
    assert found["command"] == "distance http://gpu:8000/v1 https://cpu hf:a/b@main"


def test_flags_are_typed_again() -> None:
    arguments = argparse.Namespace(text=["a", "b"], tokens=8, any_latency=True, plot=None, served=False)
    flags = ("text", "tokens", "any_latency", "plot", "served")
    assert conditions.typed(arguments, flags) == ["--text", "a", "--text", "b", "--tokens", "8", "--any-latency"]


def test_the_machine_is_named() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1e8


def test_what_is_not_installed_has_no_version() -> None:
    assert versions(["no-such-package-xgen"]) == {}


def test_gpus_are_those_that_the_driver_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert conditions.gpus() == []
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf 'NVIDIA H100 80GB HBM3\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert conditions.gpus() == ["NVIDIA H100 80GB HBM3"]


def test_a_driver_that_hangs_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", run)
    assert conditions.gpus() == []


def test_paths_of_this_machine_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    found = conditions.conditions(["quantize", f"{tmp_path}/models/a.gguf", "/home/someone/b.gguf"])
    assert found["command"] == "quantize models/a.gguf ~/b.gguf"
