"""Child processes of a benchmark: pinned to cores, each in its own process group, and ended with the benchmark."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

UPSTREAM = [sys.executable, "-m", "bench.upstream"]
PROXY = [sys.executable, "-m", "xgen_proxy.cli", "serve", "--port", "0"]


class StartError(Exception):
    """A child ended or did not become ready. The message has the end of its log."""


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, cores: str | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command on `cores` in taskset's notation ("0", "2-4"; None: any), and kill its process group at the end."""
    pinned = ["taskset", "-c", cores, *command] if cores else list(command)
    with log.open("ab") as file:
        process = subprocess.Popen(
            pinned, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(env or {}), process_group=0
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Of a child: this process's without settings of the proxy, and `extra`."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("XGEN_")}, **extra}


def listening_port(process: subprocess.Popen[bytes], log: Path, seconds: float = 30) -> int:
    """The port from the line `listening on http://HOST:PORT` in its log. Raises StartError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"listening on http://[^ :]+:(\d+)", log.read_text(errors="replace")):
            return int(found[1])
        time.sleep(0.02)
    raise StartError(f"{log.stem} does not listen; its log ends:\n{log.read_text(errors='replace')[-2000:]}")


def until_ready(port: int, seconds: float = 30) -> None:
    """Wait until the proxy on this port is ready. Raises StartError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # including HTTPError: 503 until it is ready
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2).close()
            return
        time.sleep(0.05)
    raise StartError(f"the proxy is not ready after {seconds:g} s")


def end_on_sigterm() -> None:
    """Exit on SIGTERM as on Ctrl-C, so that children are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def pin(cores: str) -> None:
    """Pin this process to `cores`."""
    subprocess.run(["taskset", "-a", "-cp", cores, str(os.getpid())], check=True, capture_output=True)
