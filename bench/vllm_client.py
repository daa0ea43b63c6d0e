"""vLLM's own load generator, kept running between loads. bench/gpu.py starts it with vLLM's Python.

Each line on stdin is a JSON list of options; the line on stdout that answers it is what `vllm bench serve` saves of a
run with them. The command runs repeatedly in one process, since importing vLLM takes ten seconds, longer than most
loads. Its own output goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def bench_serve(vllm: Callable[[], None], options: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        saved = ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        sys.argv = ["vllm", "bench", "serve", *options, *saved]
        vllm()
        return json.loads(Path(folder, "result.json").read_text())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    vllm = importlib.import_module("vllm.entrypoints.cli.main").main
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(bench_serve(vllm, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
