"""One load: `vllm bench serve`, run by a process that is kept, and what it says of a server.

It sends plain completions: its chats have their content in parts, which llama-cpp-python refuses.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import children
from bench.engines.results import PERCENTILES, TIMES, Level
from bench.engines.subjects import NAME, OFFLINE, Subject

PREFIXES = 4  # beginnings that prompts share
CLIENT = Path(__file__).parent.parent / "vllm_client.py"


class Client:
    """The load generator."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, options: argparse.Namespace) -> None:
        self.process, self.log, self.options = process, log, options
        self.answer()  # it has imported vLLM

    def run(self, url: str, subject: Subject, level: Level, requests: int, rate: float | None, seed: int) -> Any:
        """What `vllm bench serve` saves of a run. Raises StartError."""
        flags = bench_flags(self.options, url, subject, level, requests, rate, seed)
        assert self.process.stdin
        self.process.stdin.write(json.dumps(flags).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline() if self.process.stdout else b""
        if not line:
            raise children.StartError(f"the load generator ended:\n{self.log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)


@contextmanager
def client(options: argparse.Namespace, folder: Path) -> Iterator[Client]:
    command = [*shlex.split(options.vllm_python), "-P", str(CLIENT)]
    log = folder / "load.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, process_group=0,
            env=children.environment(OFFLINE),
        )  # fmt: skip
    try:
        yield Client(process, log, options)
    finally:
        process.kill()
        process.wait()


def bench_flags(
    options: argparse.Namespace, url: str, subject: Subject, level: Level, requests: int, rate: float | None, seed: int
) -> list[str]:
    flags = [
        "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions", "--model", NAME,
        "--tokenizer", str(options.hf), "--ignore-eos", "--temperature", "0", "--seed", str(seed),
        "--num-prompts", str(requests), "--percentile-metrics", ",".join(TIMES), "--metric-percentiles", "50,95,99",
        "--goodput", f"ttft:{options.slo_ttft:g}", f"tpot:{options.slo_tpot:g}",
        "--disable-tqdm", "--ready-check-timeout-sec", "0", "--save-detailed", *dataset(options, level),
    ]  # fmt: skip
    if level.streams:
        flags += ["--max-concurrency", str(level.streams)]
    if rate:
        flags += ["--request-rate", f"{rate:g}", "--burstiness", "1"]
    return flags + (["--extra-body", json.dumps(subject.extra)] if subject.extra else [])


def dataset(options: argparse.Namespace, level: Level) -> list[str]:
    if level.shared_prefix:
        rest = max(8, options.input_len - level.shared_prefix)
        return [
            "--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", str(level.shared_prefix),
            "--prefix-repetition-suffix-len", str(rest), "--prefix-repetition-num-prefixes", str(PREFIXES),
            "--prefix-repetition-output-len", str(options.output_len),
        ]  # fmt: skip
    lengths = ["--random-input-len", str(options.input_len), "--random-output-len", str(options.output_len)]
    return ["--dataset-name", "random", *lengths]


def figures(saved: Any, requests: int, output_len: int) -> dict[str, Any]:
    """Of what vllm bench serve saved: the fields of a Run."""
    completed = int(saved["completed"])
    times = {name: {each: float(saved.get(f"{each}_{name}_ms") or 0) for each in PERCENTILES} for name in TIMES}
    return {
        "requests": requests,
        "completed": completed,
        "failed": requests - completed,
        "short": completed * output_len - int(saved["total_output_tokens"]),
        "prompt_tokens": int(saved["total_input_tokens"]),
        "seconds": float(saved["duration"]),
        "output_tok_s": float(saved["output_throughput"]),
        "req_s": float(saved["request_throughput"]),
        "goodput": float(saved.get("request_goodput") or saved.get("request_goodput:") or 0),
        **times,
    }
