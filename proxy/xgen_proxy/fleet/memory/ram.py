"""The RAM that a process on this machine has left: of its cgroups, as in a container, and of the machine.

Of a cgroup counts what the kernel cannot take back: page cache is not counted, so neither is a model that is mapped
from its file. It is the cgroup that counts and not the process, since an engine may be several processes, and since
the kernel kills when the cgroup is full. https://docs.kernel.org/admin-guide/cgroup-v2.html#memory

Of a process that cannot be found, as in another PID namespace, only the machine counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from xgen_proxy.fleet.memory.pressure import Room
from xgen_proxy.fleet.memory.process import listeners

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
LOOKUP_S = 10.0  # between two searches for the processes behind ports, which read all of /proc
LOOKUP_AGAIN_S = 60.0


class LocalRooms:
    """Reads the tightest room of the process behind each port. Its methods block, so it runs in a thread."""

    def __init__(self) -> None:
        self._pids: dict[int, int] = {}
        self._found_at = -LOOKUP_AGAIN_S

    def read(self, ports: Iterable[int]) -> dict[int, Room]:
        """A port whose process is unknown, as another user's is, has the machine's room."""
        ports = list(ports)
        self._find(ports)
        machine = machine_room()
        folders = {port: folder for port in ports if (folder := cgroup_of(self._pids.get(port)))}
        rooms = {folder: [machine, *rooms_of(folder)] for folder in set(folders.values())}
        tightest = {folder: max(each, key=lambda room: room.share) for folder, each in rooms.items()}
        return {port: tightest[folders[port]] if port in folders else machine for port in ports}

    def _find(self, ports: Iterable[int]) -> None:
        age = time.monotonic() - self._found_at
        gone = any(not psutil.pid_exists(self._pids.get(port, -1)) for port in ports)
        if age >= (LOOKUP_S if gone else LOOKUP_AGAIN_S):
            self._found_at = time.monotonic()
            with contextlib.suppress(psutil.Error, OSError):
                self._pids = listeners()


def machine_room() -> Room:
    memory = psutil.virtual_memory()
    return Room(memory.available, memory.total, "this machine")


def cgroup_of(pid: int | None) -> Path | None:
    """The folder of the cgroup that accounts for the memory of the process, if the kernel has any."""
    if pid is None:
        return None
    try:
        lines = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return None
    paths = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    for names, path in paths.items():
        if "memory" in names.split(","):  # version 1
            return CGROUPS / "memory" / path.lstrip("/")
    return CGROUPS / paths[""].lstrip("/") if "" in paths else None


def rooms_of(folder: Path) -> Iterator[Room]:
    """The room of each cgroup with a limit, from this one up. Inside a container only the last folders exist."""
    for each in (folder, *folder.parents):
        if not each.is_relative_to(CGROUPS):
            return
        with contextlib.suppress(OSError, ValueError, KeyError):
            limit = int(_read(each, "memory.max", "memory.limit_in_bytes"))
            used = int(_read(each, "memory.current", "memory.usage_in_bytes"))
            if 0 < limit < psutil.virtual_memory().total:  # version 1 writes a huge number for none
                left = limit - used + _reclaimable(each)
                yield Room(min(max(left, 0), limit), limit, "its cgroup")


def _read(folder: Path, *names: str) -> str:
    """The first of these files that exists. Raises OSError."""
    for name in names[:-1]:
        with contextlib.suppress(OSError):
            return (folder / name).read_text()
    return (folder / names[-1]).read_text()


def _reclaimable(folder: Path) -> int:
    """Bytes that the kernel takes back when it needs them: page cache, without what is in RAM disks."""
    lines = (folder / "memory.stat").read_text().splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    kind = "total_" if "total_cache" in stat else ""  # version 1: with those below
    return stat[f"{kind}active_file"] + stat[f"{kind}inactive_file"] + stat.get("slab_reclaimable", 0)
