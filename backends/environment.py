"""What this machine must have, told in words before anything long begins.

python3 -m backends.environment cpu|native|dev     standard library only: it runs before anything is installed
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOM = {"cpu": 1_500, "native": 800, "dev": 2_000}  # MB, measured on the finished environments with air for the build


def problems(purpose: str) -> list[str]:
    """Each with its remedy. `purpose`: which requirements are about to be installed."""
    found = [python_too_old(), no_venv(), no_room(purpose)]
    if purpose in ("cpu", "dev"):
        found.append(no_compiler())
    return [problem for problem in found if problem]


def python_too_old() -> str | None:
    if sys.version_info >= (3, 11):  # noqa: UP036 - runs under whatever python3 is
        return None
    return (
        f"this is Python {sys.version.split()[0]}; 3.11 or newer is needed. Name another one: make PYTHON=python3.12 …"
    )


def no_venv() -> str | None:
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    return f"Python's {' and '.join(missing)} is missing; on Debian: apt install python3-venv" if missing else None


def no_room(purpose: str) -> str | None:
    free = shutil.disk_usage(ROOT).free // 10**6
    need = ROOM[purpose]
    return f"{ROOT} has {free} MB free; {need} MB are needed. Make room" if free < need else None


def no_compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if any(name and shutil.which(name.split()[0]) for name in names):
        return None
    return (
        "there is no C++ compiler, and llama-cpp-python is compiled on install; on Debian: apt install g++."
        " Or take llama.cpp's own server, which comes compiled: make run ENGINE=llama-server"
    )


def usable_cores() -> int:
    """Of this process: its affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def port_taken(host: str, port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (
                f"cannot listen on {host}:{port} ({error.strerror}); end what does, or take another: make run PORT=8090"
            )
    return None


if __name__ == "__main__":
    told = problems(sys.argv[1])
    for problem in told:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1 if told else 0)
