"""What is compared with what, and whether this machine can do it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from xgen_proxy.gguf.header import GgufFile
from xgen_proxy.models.errors import ModelError
from xgen_proxy.values import frozen

PROCESS_BYTES = 300e6  # of a process beside its model: Python, llama.cpp, the logits of a window


@frozen
class Plan:
    """`base`: one of `models`. `text`: instead of the shipped ones. `windows`: of a text at most."""

    models: tuple[Path, ...]
    base: Path
    threads: int
    text: Path | None = None
    context: int = 512
    windows: int | None = None
    repeat: int = 5
    answers: int = 50

    @property
    def prompt_tokens(self) -> int:
        return self.context // 2

    @property
    def generated_tokens(self) -> int:
        return self.context // 8


def default_threads() -> int:
    """The cores that this process may use: a second thread on the same core gains llama.cpp nothing."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def names(paths: Sequence[Path]) -> list[str]:
    """The files' names without what all have in common at the start. Raises ModelError if a file comes twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ModelError("a model is named twice")
    stems = [path.stem for path in paths]
    start = os.path.commonprefix(stems) if len(stems) > 1 else ""  # noqa: RUF071
    cut = max(start.rfind(mark) for mark in ".-_ ") + 1
    short = [stem[cut:] for stem in stems]
    return short if len(set(short)) == len(short) and all(short) else [str(path) for path in paths]


def choose_base(files: Sequence[GgufFile]) -> Path:
    """The file with the most bits per weight: the nearest to the model that all were made from."""
    return max(files, key=lambda file: file.bits_per_weight).path


def need_memory(files: Sequence[GgufFile], available: float) -> None:
    """All models are in memory at once, since their speed is measured in turns. Raises ModelError."""
    needed = sum(file.size + PROCESS_BYTES for file in files)
    if needed > available:
        raise ModelError(
            f"the {len(files)} models need {needed / 1e9:.1f} GB of memory together and {available / 1e9:.1f} GB are "
            "free; compare fewer at a time, always with the same --base"
        )
