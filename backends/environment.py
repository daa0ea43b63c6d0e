"""What this machine has: usable cores, free ports."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from proxy.memory import listener

ROOT = Path(__file__).resolve().parent.parent


def usable_cores() -> int:
    """Whole cores, of those that this process may use, within its cgroup's quota. A core's second thread is none."""
    cores = len({siblings(cpu) for cpu in os.sched_getaffinity(0)})
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores


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
    pid = listener(port)
    try:
        return f" by process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})" if pid else ""
    except OSError:  # it has just ended
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
