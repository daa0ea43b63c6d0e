"""The processes that hold the models, seen from the command: one a model, its log in a file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from xgen_proxy.models.errors import ModelError

QUOTED = 200  # characters of the log


class Worker:
    """A context manager: the process ends with the block. `log`: what llama.cpp prints."""

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log = model, log
        command = [sys.executable, "-P", "-m", "xgen_proxy.models.compare.worker"]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Raises ModelError if the model cannot do it, or its process ended."""
        message = json.dumps({"command": command, "arguments": arguments})
        try:
            line = self._exchange(message + "\n")
        except BrokenPipeError:
            line = ""
        if not line:
            raise ModelError(f"{self.model}: its process ended{self._reason()}{self._told()}")
        answer = json.loads(line)
        if "error" in answer:
            what = "llama.cpp cannot load it" if command == "load" else f"{command}: {answer['error']}"
            raise ModelError(f"{self.model}: {what}{self._told()}")
        return answer["value"]

    def _exchange(self, message: str) -> str:
        """The answer, empty where the process ended without one."""
        to, back = self._process.stdin, self._process.stdout
        if to is None or back is None:
            raise RuntimeError("both are pipes")
        to.write(message)
        to.flush()
        return back.readline()

    def _reason(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return " by SIGKILL, as when memory runs out; compare fewer or smaller models"
        return f" by {signal.Signals(-status).name}" if status < 0 else f" with status {status}"

    def _told(self) -> str:
        """The log's first line that tells of an error."""
        lines = self.log.read_text(errors="replace").splitlines()
        telling = [line.strip() for line in lines if "error" in line.lower() and not line.startswith(" ")]
        return f" ({telling[0][:QUOTED]})" if telling else ""
