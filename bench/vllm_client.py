"""vLLM's own load generator, kept running between loads: bench/gpu.py starts it with vLLM's Python.

A line on stdin is a JSON list of the options of `vllm bench serve`; the line that answers it on stdout is the JSON that
--save-result would write. Importing vLLM takes ten seconds, longer than most loads: once is enough. What vLLM prints
goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve = importlib.import_module("vllm.benchmarks.serve")
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    serve.add_cli_args(parser)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        result = serve.main(parser.parse_args(json.loads(line)))
        print(json.dumps(result, default=float), file=answers, flush=True)


if __name__ == "__main__":
    main()
