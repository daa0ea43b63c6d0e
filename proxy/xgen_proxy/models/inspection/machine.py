"""The memory that this machine has for a model: RAM within the cgroup's limit, and NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import psutil

from xgen_proxy.values import frozen

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


@frozen
class Place:
    """Where a model could be loaded. `total` and `available` in bytes."""

    name: str
    total: int
    available: int


def places() -> list[Place]:
    """RAM first."""
    return [ram(), *gpus()]


def ram() -> Place:
    """What a container may use is less than what its machine has."""
    memory = psutil.virtual_memory()
    place = Place("RAM", memory.total, memory.available)
    for group in cgroups():
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text()) - inactive(group)
            if limit < place.total:
                name = "RAM (limit of the container)"
                place = Place(name, limit, min(place.available, max(0, limit - used)))
    return place


def cgroups() -> list[Path]:
    """Ours and its parents: the smallest limit applies. https://docs.kernel.org/admin-guide/cgroup-v2.html"""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    group = next((CGROUPS / line[4:] for line in lines if line.startswith("0::/")), CGROUPS)
    return [group, *group.parents][: len(group.parts) - len(CGROUPS.parts) + 1]


def inactive(group: Path) -> int:
    """The page cache that the kernel gives up for the asking."""
    lines = (group / "memory.stat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def gpus() -> list[Place]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):  # there is a program but no driver
        return []
    found = []
    for line in done.stdout.splitlines():
        index, name, total, free = (cell.strip() for cell in line.split(","))
        with contextlib.suppress(ValueError):  # "[N/A]", on machines whose GPU shares the RAM
            found.append(Place(f"GPU {index} ({name})", int(total) * 2**20, int(free) * 2**20))
    return found
