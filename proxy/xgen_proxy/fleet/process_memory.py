"""The memory of a backend on this machine, read from /proc, since no backend reports it over HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

LISTEN = "0A"  # net/tcp's state column: https://docs.kernel.org/networking/proc_net_tcp.html


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
    """The id of the process that listens on a TCP port of this machine."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        if not sockets.isdisjoint(_open_files(process)):
            return int(process.name)
    return None


def _open_files(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # the process is gone, or not ours to read
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed since it was listed, as files of a busy server are
                yield os.readlink(fd)


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in _lines(Path(table))[1:]:
            columns = row.split()
            if columns[3] == LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(columns[9])
    return inodes


def rss(pid: int) -> int | None:
    for line in _lines(Path(f"/proc/{pid}/status")):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None


def model_file(pid: int) -> int | None:
    """The size of the model file that llama.cpp has mapped into memory."""
    paths = {line.split(maxsplit=5)[-1] for line in _lines(Path(f"/proc/{pid}/maps")) if line.endswith(".gguf")}
    sizes = [Path(path).stat().st_size for path in paths if Path(path).exists()]
    return sum(sizes) if sizes else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
