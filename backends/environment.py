"""Usable cores and free ports of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores that this process may use, within its affinity and its cgroup's quota.

    psutil.cpu_count(logical=False) counts the cores of the whole machine.
    """
    cores = len({siblings(cpu) for cpu in os.sched_getaffinity(0)})
    return max(1, min(cores, *(cpu_quota(group) for group in cgroups())))


def cgroups() -> list[Path]:
    """Our cgroup and its parents: the smallest quota applies. https://docs.kernel.org/admin-guide/cgroup-v2.html"""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    group = next((CGROUPS / line[4:] for line in lines if line.startswith("0::/")), CGROUPS)
    return [group, *group.parents][: len(group.parts) - len(CGROUPS.parts) + 1]


def cpu_quota(group: Path) -> int:
    """The CPU time that the cgroup may use, in whole cores."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):  # no such file, or "max": no quota
        return sys.maxsize


def siblings(cpu: int) -> str:
    """The logical CPUs that share this one's core; its own number if the kernel does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def port_taken(host: str, port: int) -> str | None:
    """Why the port cannot be listened on, and what to do; None if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"cannot listen on {host}:{port}: {error.strerror}{holder(port)}. Choose another: make run PORT=8090"
    return None


def holder(port: int) -> str:
    """For a message: the process that listens on the port. Empty if this user may not see it."""
    for connection in psutil.net_connections("tcp"):
        address = connection.laddr
        if connection.status == psutil.CONN_LISTEN and address and address.port == port and connection.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
