"""A supervised child process: it has its own session and log, and dies with its supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
LAST_LINES = 15
# Prefixes of the variables that children inherit. llama_cpp.server would let HOST, PORT, MODEL, CACHE, VERBOSE and many
# more override its flags, and `make run PORT=…` sets some of them.
KEPT = (
    "CUDA_",
    "DYLD_",
    "GGML_",
    "HF_",
    "HOME",
    "LANG",
    "LC_",
    "LD_",
    "LLAMA_LOG",
    "LOGNAME",
    "OMP_",
    "PATH",
    "PYTHONHASH",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "SHELL",
    "SSL_",
    "TMPDIR",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
    "XDG_",
    "XGEN_",
)


class Child:
    """A command in a session of its own: a terminal's Ctrl-C reaches only the supervisor, which ends its children in
    order, and a child's own children can be killed with it."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        shim = [sys.executable, "-m", "backends.process", str(os.getpid()), *self.command]
        environment = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                shim, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def last_lines(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(f"  | {line}" for line in lines[-LAST_LINES:])

    def stop(self, grace_s: float) -> None:
        """Send SIGTERM, and after `grace_s` SIGKILL to the whole group."""
        if self.process is None:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def become(parent: int, command: Sequence[str]) -> None:
    """Runs in the child: ask the kernel to kill it with its parent, then become the command."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        sys.exit(1)
    os.execvp(command[0], list(command))  # noqa: S606


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
