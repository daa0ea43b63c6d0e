"""The command `models compare`: its flags, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xgen_proxy.models.compare.comparison import compare
from xgen_proxy.models.compare.plan import Plan, choose_base, default_threads
from xgen_proxy.models.compare.report import WIDTH, Row, advice, cost_rows, method, quality_rows
from xgen_proxy.models.conditions import conditions, typed
from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.files.gguf_file import read_model
from xgen_proxy.models.served.commands import add_distance, at_least, run_served
from xgen_proxy.models.storage import result_file

PACKAGES = ("xgen-proxy", "llama-cpp-python", "numpy")

EXAMPLES = """\
examples:
  xgen-proxy models compare model-f16.gguf model-Q8_0.gguf model-Q4_K_M.gguf
  xgen-proxy models compare Q4_K_M.gguf Q4_0.gguf --base f16.gguf --json result.json --plot result.svg
  xgen-proxy models compare Q4_K_M.gguf --base f16.gguf --text my-prompts.txt --answers 0
  xgen-proxy models compare A.gguf B.gguf --windows 1 --repeat 1 --answers 5      a quick look

The base is what the others were made from: an f16 or bf16 file. Without --base it is the file with the most bits per
weight. A base that was itself made from a quantised file shows only the loss that the others add.

  perplexity       how surprised the model is by the text; compares only files of one model
  KLD              how far its probabilities are from the base's, in nats: 0 is equal; 99.9 %: at the worst tokens
  same top token   how often it would choose the same next token as the base: what a user notices
  same answers     greedy answers to fixed prompts that are the base's, token by token

Everything runs on the CPU, one process a model. With nothing else running, the speeds mean something.
"""


def add_compare(subparsers: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="measure quantised models against their base: size, speed, memory, divergence",
        description="Measure GGUF files of one model against each other: size, load time, memory, speed, perplexity, "
        "divergence from the base, and the share of the same answers, in English, Korean and code.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("models", nargs="+", metavar="MODEL", help="a GGUF file")
    command.add_argument(
        "--served",
        action="store_true",
        help="compare what two running engines say, of which MODEL are the addresses; see `xgen-proxy models distance`",
    )
    command.add_argument("--base", type=Path, metavar="FILE", help="what the others were made from (see below)")
    command.add_argument("--text", type=Path, metavar="FILE", help="measure on this text instead of the shipped ones")
    command.add_argument("--context", type=at_least(16), default=512, metavar="N", help="tokens of a window (512)")
    command.add_argument("--windows", type=at_least(1), metavar="N", help="of each text at most (all)")
    command.add_argument("--repeat", type=at_least(1), default=5, metavar="N", help="rounds of load and speed (5)")
    command.add_argument("--answers", type=at_least(0), default=50, metavar="N", help="prompts to answer (50)")
    command.add_argument("--threads", type=at_least(1), metavar="N", help="of llama.cpp (the cores of this machine)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures and their conditions")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw size against divergence and speed: .svg, .png")
    return command


def run_compare(arguments: argparse.Namespace) -> int:
    """Raises ModelError."""
    if arguments.served:
        return run_distance(arguments)
    check(arguments)
    plan = planned(arguments)
    result = compare(plan)
    result = {"conditions": conditions(words(arguments), PACKAGES), "advice": advice(result), **result}
    sys.stdout.write(f"{report(result)}\n")
    if arguments.json:
        with result_file(arguments.json) as file:
            file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if arguments.plot:
        from xgen_proxy.models.compare.plot import draw

        with result_file(arguments.plot) as file:
            draw(result, file)
    return 0


def run_distance(arguments: argparse.Namespace) -> int:
    """`--served`: another command, with its own defaults. Raises UsageError for flags that only files have."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    files = add_compare(commands)
    for flag in ("base", "context", "windows", "repeat", "answers", "threads", "plot"):
        if getattr(arguments, flag) != files.get_default(flag):
            raise UsageError(f"--{flag} is for files; see `xgen-proxy models distance --help` for what --served knows")
    add_distance(commands)
    flags = [f"--{name}={value}" for name in ("text", "json") if (value := getattr(arguments, name)) is not None]
    return run_served(parser.parse_args(["distance", *arguments.models, *flags]))


def check(arguments: argparse.Namespace) -> None:
    """Fail at the start, not after the measurement. Raises ModelError; ModuleNotFoundError for a missing package."""
    needed = ["llama_cpp", *(["matplotlib"] if arguments.plot else [])]
    for package in needed:
        if find_spec(package) is None:
            message = f"compare needs {package}: pip install '.[models]' in a checkout of xgen-proxy"
            raise ModuleNotFoundError(message, name=package)
    for file in (arguments.json, arguments.plot):
        if file and not file.resolve().parent.is_dir():
            raise ModelError(f"{file}: there is no folder {file.resolve().parent}")
    if arguments.plot and arguments.plot.suffix not in (".svg", ".png"):
        raise ModelError(f"--plot {arguments.plot}: its name must end in .svg or .png")


def planned(arguments: argparse.Namespace) -> Plan:
    models = [Path(model) for model in arguments.models]
    base: Path | None = arguments.base
    if base is None:
        base = choose_base([read_model(path) for path in models])
    elif base.resolve() not in [path.resolve() for path in models]:
        models = [base, *models]
    else:
        [base] = [path for path in models if path.resolve() == base.resolve()][:1]
    if len(models) < 2:
        raise ModelError("compare needs two models, or a model and --base")
    return Plan(
        models=tuple(models),
        base=base,
        threads=arguments.threads or default_threads(),
        text=arguments.text,
        context=arguments.context,
        windows=arguments.windows,
        repeat=arguments.repeat,
        answers=arguments.answers,
    )


def words(arguments: argparse.Namespace) -> list[str]:
    """The command with all its flags, as it can be typed again."""
    flags = ("base", "text", "context", "windows", "repeat", "answers", "threads", "json", "plot")
    return ["xgen-proxy", "models", "compare", *map(str, arguments.models), *typed(arguments, flags)]


def report(result: dict[str, Any]) -> str:
    tables = (table(list(cost_rows(result))), table(list(quality_rows(result))))
    return "\n\n".join((*tables, method(result), textwrap.fill(result["advice"], WIDTH)))


def table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
