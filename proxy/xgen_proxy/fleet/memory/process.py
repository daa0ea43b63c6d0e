"""The memory of a backend on this machine, since no backend reports it over HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path
from typing import TypedDict

import psutil


class Memory(TypedDict):
    """Bytes. None if unknown: another machine, another user's process, no such file."""

    process_rss_bytes: int | None
    model_file_bytes: int | None


def memory_of(host: str, port: int) -> Memory:
    pid = listener(port) if is_local(host) else None
    if pid is None:
        return {"process_rss_bytes": None, "model_file_bytes": None}
    return {"process_rss_bytes": rss(pid), "model_file_bytes": model_file(pid)}


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listener(port: int) -> int | None:
    """The id of the process that listens on a TCP port of this machine. None if another user owns it."""
    return listeners().get(port)


def listeners() -> dict[int, int]:
    """The id of the process that listens on each TCP port, where it is known."""
    listening = (each for each in psutil.net_connections(kind="tcp") if each.status == psutil.CONN_LISTEN)
    return {each.laddr.port: each.pid for each in listening if each.laddr and each.pid}


def rss(pid: int) -> int | None:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return None


def model_file(pid: int) -> int | None:
    """The size of the model file that llama.cpp has mapped into memory.

    Read from /proc/PID/maps by hand: psutil reads smaps, for which the kernel walks all pages of the process while it
    holds the process's memory lock.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {Path(line.split(maxsplit=5)[-1]) for line in lines if line.endswith(".gguf")}
    sizes = [path.stat().st_size for path in paths if path.exists()]
    return sum(sizes) if sizes else None
