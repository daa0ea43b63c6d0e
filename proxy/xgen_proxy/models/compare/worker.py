"""A process with one model: reads commands from its standard input, a JSON object a line, and answers each with one.

    python -m xgen_proxy.models.compare.worker

llama.cpp never gives back all memory, prints to standard error, and ends the process on some files; none of that may
reach another model, or the user. `processes.Worker` is the other side.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from xgen_proxy.models.compare.divergence import Logits, measure
from xgen_proxy.models.compare.evaluation import Model, resident_bytes


class Commands:
    """Each public method is a command."""

    def __init__(self) -> None:
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        if self._model is None:
            raise RuntimeError("no model was loaded")
        return self._model

    def load(self, path: str, context: int, threads: int, mmap: bool) -> dict[str, Any]:
        """`empty_bytes`: the memory of the process before."""
        empty = resident_bytes()
        self._model = model = Model(path, context, threads, mmap)
        return {"load_s": model.load_s, "empty_bytes": empty}

    def memory(self) -> int:
        return resident_bytes()

    def vocabulary(self) -> str:
        """A fingerprint."""
        return hashlib.sha256(b"\0".join(self.model.vocabulary())).hexdigest()

    def vocabulary_size(self) -> int:
        return self.model.vocabulary_size

    def tokenize(self, text: str) -> list[int]:
        return self.model.tokenize(text)

    def write_window(self, tokens: list[int], file: str) -> None:
        """As the base: keep the logits for the others."""
        np.save(file, self.model.window(tokens))

    def window(self, tokens: list[int], file: str) -> dict[str, Any]:
        """Compare with the logits that the base wrote."""
        base: Logits = np.load(file, mmap_mode="r")
        found = measure(base, self.model.window(tokens), tokens[len(tokens) // 2 + 1 :])
        return {"losses": found.losses, "divergences": found.divergences, "same_top": found.same_top}

    def speed(self, tokens: list[int], count: int) -> dict[str, float]:
        return self.model.speed(tokens, count)

    def answer(self, prompt: str, count: int) -> list[int]:
        return self.model.answer(prompt, count)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command that started this process
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what native code prints must not break the answers
        commands = Commands()
        for line in sys.stdin:
            answers.write(json.dumps(reply(commands, json.loads(line))) + "\n")
            answers.flush()


def reply(commands: Commands, message: dict[str, Any]) -> dict[str, Any]:
    command: Callable[..., Any] = getattr(commands, message["command"])
    try:
        return {"value": command(**message["arguments"])}
    except Exception as error:  # the other side tells the user; the traceback is in this process's log
        sys.excepthook(type(error), error, error.__traceback__)
        return {"error": str(error) or type(error).__name__}


if __name__ == "__main__":
    main()
