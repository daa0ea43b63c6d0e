"""Child processes of a benchmark: pinned to cores, in a process group of their own, awaited and ended."""

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


class Failed(Exception):
    """A child ended, or never got ready; with the end of its log."""


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, cores: str | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`cores` as taskset takes them ("0", "2-4"); None: any. The children of the child end with it."""
    pinned = ["taskset", "-c", cores, *command] if cores else list(command)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("XGEN_")}
    with log.open("ab") as file:
        process = subprocess.Popen(
            pinned, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**clean, **(env or {})}, process_group=0
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told_port(process: subprocess.Popen[bytes], log: Path, seconds: float = 30) -> int:
    """The port in its line `listening on http://HOST:PORT`. Raises Failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"listening on http://[^ :]+:(\d+)", log.read_text(errors="replace")):
            return int(found[1])
        time.sleep(0.02)
    raise Failed(f"{log.stem} does not listen; its log ends:\n{log.read_text(errors='replace')[-2000:]}")


def until_ready(port: int, seconds: float = 30) -> None:
    """Until the proxy on this port knows a backend. Raises Failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # HTTPError is one: 503 until then
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2).close()
            return
        time.sleep(0.05)
    raise Failed(f"the proxy is not ready after {seconds:g} s")


def end_on_sigterm() -> None:
    """Tidily, as by Ctrl-C: what was started is ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def pin(cores: str) -> None:
    """This process too."""
    subprocess.run(["taskset", "-a", "-cp", cores, str(os.getpid())], check=True, capture_output=True)
