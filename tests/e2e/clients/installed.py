"""The clients, installed as their lock files say: Python ones into .venv-clients, the others beside their lock.

Nothing is installed twice: a file in each folder names the lock that it was made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.documents import ROOT

NODE = Path(__file__).parent / "node"
MODULES = NODE / "node_modules"
BIN = MODULES / ".bin"
PLATFORM = f"linux-{'arm64' if platform.machine() == 'aarch64' else 'x64'}"
VENV = ROOT / ".venv-clients"
PYTHON = str(VENV / "bin" / "python")


class NotInstalledError(Exception):
    """A package manager is missing or failed."""


def install_python() -> None:
    """Raises NotInstalledError."""
    requirements = ROOT / "requirements" / "clients.txt"
    with _made_from(requirements, VENV) as is_new:
        if is_new:
            _run(sys.executable, "-m", "venv", "--clear", str(VENV))
            _run(PYTHON, "-m", "pip", "install", "-q", "--require-hashes", "--no-deps", "-r", str(requirements))


def install_node() -> None:
    """Without the packages' own scripts: what runs here is what the lock file has the hashes of.

    Raises NotInstalledError.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise NotInstalledError("node and npm are not installed")
    with _made_from(NODE / "package-lock.json", MODULES) as is_new:
        if is_new:
            _run(npm, "ci", "--prefix", str(NODE), "--no-audit", "--no-fund", "--ignore-scripts")


@contextmanager
def _made_from(lock: Path, folder: Path) -> Iterator[bool]:
    """Yields whether the folder must be installed anew, and records the lock file when the block ends."""
    digest, mark = hashlib.sha256(lock.read_bytes()).hexdigest(), folder / ".made-from"
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # of two test runs at once, the second waits
        is_new = not mark.exists() or mark.read_text() != digest
        yield is_new
        mark.write_text(digest)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise NotInstalledError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
