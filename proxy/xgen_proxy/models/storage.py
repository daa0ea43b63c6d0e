"""Files that appear whole or not at all: written beside their place, synced, checked, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.progress import say

MARGIN = 64 * 1024 * 1024  # bytes that stay free on the disk
UNFINISHED = ".unfinished-"


def free_space(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def need_space(folder: Path, size: int, what: str) -> None:
    """Raises ModelError if the disk of `folder` has no room for `size` bytes."""
    free = free_space(folder)
    if free < size + MARGIN:
        raise ModelError(
            f"{folder} has {free / 1e6:,.0f} MB free, and {what} needs {(size + MARGIN) / 1e6:,.0f} MB; "
            "free some space or choose another folder"
        )


def make_folder(folder: Path) -> None:
    """Raises ModelError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the folder {folder}: {error.strerror}") from None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time. Removes what a killed one left."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another command is at work in {folder}; waiting until it ends")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def scratch_in(folder: Path) -> Iterator[Path]:
    """A folder on the same disk, which is removed at the end."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as scratch:
        yield Path(scratch)


def publish(made: Path, target: Path) -> None:
    """Rename the finished file to its place, once its bytes are on the disk."""
    sync(made)
    made.rename(target)
    sync(target.parent)


@contextlib.contextmanager
def result_file(path: Path) -> Iterator[Path]:
    """Yields where to write it, with the same ending. It gets to its place when the block ends without an error.

    Pipes and devices, such as /dev/stdout, are written in place. Raises ModelError if it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        target = path.resolve()
        with scratch_in(target.parent) as scratch:
            yield scratch / target.name
            publish(scratch / target.name, target)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from None


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
