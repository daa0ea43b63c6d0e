"""The memory of this machine: the smallest limit of the cgroups, and GPUs where nvidia-smi tells of them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from xgen_proxy.models.inspection import machine
from xgen_proxy.models.inspection.machine import Place, gpus, places, ram


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process's cgroup."""
    made = tmp_path / "cgroup" / "a" / "b"
    made.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/a/b\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    return made


def limit(group: Path, most: str, used: int, cache: int) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def test_without_a_limit_it_is_the_machines(group: Path) -> None:
    limit(group, "max", 0, 0)
    found = ram()
    assert (found.name, found.total) == ("RAM", psutil.virtual_memory().total)


def test_the_smallest_limit_applies_and_the_page_cache_is_free(group: Path) -> None:
    limit(group, "50000000", 30_000_000, 20_000_000)
    limit(group.parent, "70000000", 0, 0)
    assert ram() == Place("RAM (limit of the container)", 50_000_000, 40_000_000)


def script(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "echo '0, NVIDIA H100, 81559, 81000'; echo '1, GB10, [N/A], [N/A]'", monkeypatch)
    assert gpus() == [Place("GPU 0 (NVIDIA H100)", 81559 * 2**20, 81000 * 2**20)]
    assert [place.name.split()[0] for place in places()] == ["RAM", "GPU"]


def test_a_program_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "exit 9", monkeypatch)
    assert gpus() == []
