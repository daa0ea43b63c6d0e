"""What this machine has: usable cores, free ports."""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CGROUPS = Path("/sys/fs/cgroup")
LISTEN = "0A"  # net/tcp's state column: https://docs.kernel.org/networking/proc_net_tcp.html


def usable_cores() -> int:
    """Whole cores, of those that this process may use, within its cgroup's quota. A core's second thread is none."""
    cores = len({siblings(cpu) for cpu in os.sched_getaffinity(0)})
    return max(1, min(cores, *(cpu_quota(group) for group in cgroups())))


def cgroups() -> list[Path]:
    """Ours and those that it lies in: the narrowest quota of them counts. https://docs.kernel.org/admin-guide/cgroup-v2.html"""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    group = next((CGROUPS / line[4:] for line in lines if line.startswith("0::/")), CGROUPS)
    return [group, *group.parents][: len(group.parts) - len(CGROUPS.parts) + 1]


def cpu_quota(group: Path) -> int:
    """Whole cores' worth of time."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):  # no such file, or "max": no quota
        return sys.maxsize


def siblings(cpu: int) -> str:
    """The logical CPUs of the core that this one belongs to; its own number where the kernel does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def port_taken(host: str, port: int) -> str | None:
    """Why nobody can listen there, with the remedy; None where one can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"cannot listen on {host}:{port}: {error.strerror}{holder(port)}. Choose another: make run PORT=8090"
    return None


def holder(port: int) -> str:
    """For a message: who listens there, where /proc tells it."""
    sockets = listening_sockets(port)
    for fd in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours to look at
            if os.readlink(fd) in sockets:
                pid = fd.split("/")[2]
                return f" by process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    return ""


def listening_sockets(port: int) -> set[str]:
    """As /proc/PID/fd/N shows them."""
    tables = [Path(table) for table in ("/proc/net/tcp", "/proc/net/tcp6") if Path(table).exists()]
    rows = [row.split() for table in tables for row in table.read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == LISTEN and row[1].endswith(f":{port:04X}")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
