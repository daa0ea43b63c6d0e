"""CPU, memory, file descriptors and TCP sockets of a process and its children."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Socket:
    """A TCP socket that a process holds; `remote` is 0 while it listens."""

    local: int
    remote: int
    state: str


def process_tree(root: int) -> Iterator[psutil.Process]:
    """The process and all its descendants that still run."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(root)
        yield process
        yield from process.children(recursive=True)


def cpu_seconds(root: int) -> float:
    """User and system time of the process and its children so far."""
    total = 0.0
    for process in process_tree(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def rss_mb(root: int) -> float:
    """Resident memory of the process and its children, in MiB."""
    total = 0
    for process in process_tree(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def open_files(pid: int) -> int:
    """File descriptors, sockets included."""
    return psutil.Process(pid).num_fds()


def sockets(pid: int) -> list[Socket]:
    """The TCP sockets of which the process has a descriptor, in any state."""
    return [
        Socket(each.laddr.port if each.laddr else 0, each.raddr.port if each.raddr else 0, each.status)
        for each in psutil.Process(pid).net_connections("tcp")
    ]


def listener(port: int) -> psutil.Process | None:
    """The process that listens on the port."""
    for each in psutil.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid:
            return psutil.Process(each.pid)
    return None
