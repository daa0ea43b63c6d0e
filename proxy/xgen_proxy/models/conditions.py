"""The conditions of a measurement: the command, the date, the machine and the versions, for result files."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")


def conditions(command: Sequence[str], packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a result file says about its run. `command`: the words that a user types. `packages`: PyPI names."""
    return {
        "command": portable(shlex.join(command)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(packages)},
    }


def typed(arguments: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """The flags and their values, as they can be typed again. `flags` has no key: result files are shown to others."""
    words: list[str] = []
    for flag in flags:
        value, name = getattr(arguments, flag), f"--{flag.replace('_', '-')}"
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words += [word for each in (value if isinstance(value, list) else [value]) for word in (name, str(each))]
    return words


def without_password(text: str) -> str:
    """Without the user and the password of the URLs in it."""
    return USERINFO.sub("", text)


def portable(text: str) -> str:
    """Without passwords, and without the paths of this machine: the current folder is `.`, the user's home `~`."""
    return without_password(text).replace(f"{Path.cwd()}/", "").replace(str(Path.home()), "~")


def machine() -> dict[str, Any]:
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "os": platform.platform(),
    }


def processor() -> str:
    """The processor's name; Linux tells it in /proc/cpuinfo only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpus() -> list[str]:
    """The names of the NVIDIA GPUs, or none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):  # also a driver that hangs: the measurement is done and is kept
        return []
    return done.stdout.splitlines()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
