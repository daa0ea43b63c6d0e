"""Measure what the proxy costs in front of a vLLM server, with vLLM's own load generator.

    python -m bench.gpu --url http://127.0.0.1:8000 --tokenizer MODEL_DIR --vllm-python .venv-vllm/bin/python

`vllm bench serve` sends greedy streams of a fixed length. In each rotation, every level of concurrency is measured
directly and through the proxy with the same prompts; the order alternates. Each rotation has its own prompts. Start the
server with --no-enable-prefix-caching, or the second run finds the prompts cached. Ratios compare the two runs of one
rotation, so that slow drift cancels out. The server, the proxy and the load share this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import children, plot, processes

EXAMPLES = """\
examples:
  a GPU, six minutes at most:
    python -m bench.gpu --url http://127.0.0.1:8000 --tokenizer models/llama --vllm-python /opt/vllm/bin/python \\
        --minutes 6 --json gpu.json --plot gpu.svg
  vLLM's CPU build, to see that it works:
    python -m bench.gpu --url http://127.0.0.1:8000 --tokenizer models/smollm2-hf --vllm-python .venv-vllm/bin/python \\
        --levels 1:3 4:8 --input-len 32 --output-len 16 --repeats 2
"""
DIRECT, THROUGH = "direct", "through"
FIGURES = {  # name in vllm bench serve → name in the table
    "output_throughput": "output tok/s",
    "median_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_e2el_ms": "E2E p50 ms",
}


@dataclass(frozen=True)
class Level:
    """A load: the number of concurrent streams and of requests in all."""

    streams: int
    prompts: int


@dataclass
class Load:
    """One run of the load generator. `cpu_s`: CPU time of the proxy per 1,000 requests. `short`: tokens missing from
    successful requests."""

    where: str
    streams: int
    rotation: int
    figures: dict[str, float]
    completed: int
    failed: int
    short: int
    prompt_tokens: int
    seconds: float
    cpu_s: float | None = None


@dataclass
class Session:
    """The running processes. `proxy`: its process id."""

    options: argparse.Namespace
    model: str
    client: subprocess.Popen[str]
    urls: dict[str, str]
    proxy: int
    loads: list[Load] = field(default_factory=list)


def a_level(text: str) -> Level:
    streams, _, prompts = text.partition(":")
    if not (streams.isdecimal() and prompts.isdecimal() and 0 < int(streams) <= int(prompts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not STREAMS:PROMPTS, with at least as many prompts as streams")
    return Level(int(streams), int(prompts))


def model_at(url: str) -> str:
    """The name of the server's first model. Raises OSError."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        return str(json.load(answer)["data"][0]["id"])


@contextmanager
def load_client(python: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    command = [python, "-P", str(Path(__file__).with_name("vllm_client.py"))]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0
        )
    try:
        answer(process, log)
        yield process
    finally:
        process.kill()
        process.wait()


def answer(client: subprocess.Popen[str], log: Path) -> Any:
    """The next line of the load generator. Raises StartError with the end of its log."""
    line = client.stdout.readline() if client.stdout else ""
    if not line:
        raise children.StartError(f"the load generator ended: {log.read_text(errors='replace')[-2000:]}")
    return json.loads(line)


def bench_options(session: Session, url: str, level: Level, seed: int) -> list[str]:
    options = session.options
    return [
        "--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions", "--model", session.model,
        "--tokenizer", str(options.tokenizer), "--dataset-name", "random", "--ignore-eos", "--temperature", "0",
        "--random-input-len", str(options.input_len), "--random-output-len", str(options.output_len),
        "--num-prompts", str(level.prompts), "--max-concurrency", str(level.streams), "--seed", str(seed),
        "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99", "--disable-tqdm",
        "--ready-check-timeout-sec", "0",
    ]  # fmt: skip


def measure(session: Session, where: str, level: Level, rotation: int, folder: Path) -> Load:
    before = processes.cpu_seconds(session.proxy)
    began = time.monotonic()
    order = json.dumps(bench_options(session, session.urls[where], level, session.options.seed + rotation))
    assert session.client.stdin
    print(order, file=session.client.stdin, flush=True)
    result = answer(session.client, folder / "client.log")
    load = Load(
        where, level.streams, rotation, {name: float(result[name]) for name in FIGURES}, int(result["completed"]),
        int(result["failed"]), int(result["completed"]) * session.options.output_len - result["total_output_tokens"],
        int(result["total_input_tokens"]), time.monotonic() - began,
    )  # fmt: skip
    if where == THROUGH:
        load.cpu_s = (processes.cpu_seconds(session.proxy) - before) / max(1, load.completed) * 1000
    progress(f"{where}, {level.streams} streams: {load.figures['output_throughput']:.0f} tok/s, {load.failed} failed")
    return load


def rotate(session: Session, rotation: int, folder: Path) -> None:
    for number, level in enumerate(session.options.levels):
        turns = (DIRECT, THROUGH) if (rotation + number) % 2 == 0 else (THROUGH, DIRECT)
        session.loads += [measure(session, where, level, rotation, folder) for where in turns]


def run(options: argparse.Namespace, folder: Path) -> list[Load]:
    """Run as many complete rotations as requested and as fit into the time. Raises StartError."""
    began = time.monotonic()
    log = folder / "proxy.log"
    with (
        children.running([*children.PROXY, "--vllm", options.url], log) as proxy,
        load_client(options.vllm_python, folder / "client.log") as client,
    ):
        port = children.listening_port(proxy, log)
        children.until_ready(port)
        urls = {DIRECT: options.url, THROUGH: f"http://127.0.0.1:{port}"}
        session = Session(options, model_at(options.url), client, urls, proxy.pid)
        top = max(options.levels, key=lambda level: level.streams)
        for where in urls:  # the first run compiles kernels and opens connections
            measure(session, where, Level(top.streams, min(top.prompts, 2 * top.streams)), options.repeats, folder)
        longest = 0.0
        for rotation in range(options.repeats):
            start = time.monotonic()
            if start - began + longest > options.minutes * 60:
                progress("the time is up")
                break
            progress(f"rotation {rotation + 1}")
            rotate(session, rotation, folder)
            longest = max(longest, time.monotonic() - start)
            if options.json:
                options.json.write_text(json.dumps([asdict(load) for load in session.loads], indent=1))
            progress(f"so far\n{table(session.loads)}")
        return session.loads


def progress(text: str) -> None:
    print(f"gpu: {text}", file=sys.stderr, flush=True)


def ratios(loads: list[Load], streams: int, name: str) -> list[float]:
    """Through / direct for each rotation."""
    value = {(load.where, load.rotation): load.figures[name] for load in loads if load.streams == streams}
    return [value[THROUGH, rotation] / value[DIRECT, rotation] for where, rotation in value if where == DIRECT]


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def row(loads: list[Load], where: str, streams: int) -> list[str]:
    own = [load for load in loads if load.where == where and load.streams == streams]
    cells = [spread([load.figures[name] for load in own], 0) for name in FIGURES]
    cpu = [load.cpu_s for load in own if load.cpu_s is not None]
    failed = f"{sum(load.failed for load in own)} of {sum(load.failed + load.completed for load in own)}"
    return [str(streams), where, *cells, failed, spread(cpu, 2) if cpu else "-"]


def table(loads: list[Load]) -> str:
    rows = [["streams", "", *FIGURES.values(), "failed", "proxy CPU s / 1,000 requests"]]
    for streams in sorted({load.streams for load in loads}):
        rows += [row(loads, where, streams) for where in (DIRECT, THROUGH)]
        rows.append([str(streams), "ratio", *(spread(ratios(loads, streams, name), 3) for name in FIGURES), "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def warnings(loads: list[Load]) -> list[str]:
    """Reasons to doubt the comparison."""
    found = [
        f"{load.where}, {load.streams} streams, rotation {load.rotation + 1}: {load.short} tokens less than requested"
        for load in loads
        if load.short
    ]
    prompts: dict[tuple[int, int], set[int]] = {}
    for load in loads:
        if not load.failed:
            prompts.setdefault((load.streams, load.rotation), set()).add(load.prompt_tokens)
    return found + [f"{streams} streams, rotation {rotation + 1}: the prompts were not the same"
                    for (streams, rotation), counts in prompts.items() if len(counts) > 1]  # fmt: skip


def draw(loads: list[Load], path: Path) -> None:
    def bar(streams: int, name: str) -> tuple[float, float, float]:
        percent = [100 * ratio for ratio in ratios(loads, streams, name)]
        return min(percent), statistics.median(percent), max(percent)

    levels = sorted({load.streams for load in loads})
    panels = {f"{n} streams: % of direct": {FIGURES[name]: bar(n, name) for name in FIGURES} for n in levels}
    plot.bars(path, "vLLM through xgen-proxy, as a percentage of vLLM direct (median, least to most)", panels)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="the vLLM server, http://HOST:PORT")
    parser.add_argument("--tokenizer", required=True, type=Path, help="the model's directory, for the random prompts")
    parser.add_argument("--vllm-python", required=True, help="a Python with vLLM, for the load generator")
    parser.add_argument("--levels", nargs="+", type=a_level, metavar="STREAMS:PROMPTS",
                        default=[Level(1, 10), Level(64, 320), Level(256, 1024)])  # fmt: skip
    parser.add_argument("--input-len", type=int, default=256, help="tokens per prompt (%(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens per answer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rotations (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="start no rotation that would end later")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first rotation's prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every run's figures, written after each rotation")
    parser.add_argument("--plot", type=plot.picture, metavar="FILE.svg", help="needs matplotlib")
    return parser.parse_args(argv)


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        try:
            loads = run(options, Path(folder))
        except (children.StartError, OSError) as error:
            sys.exit(f"gpu: {error}")
    if not loads:
        sys.exit("the time was up before the first rotation")
    print(table(loads))
    print("\n".join(warnings(loads)))
    if options.plot:
        draw(loads, options.plot)
    return 1 if any(load.failed or load.short for load in loads) else 0


if __name__ == "__main__":
    sys.exit(main())
