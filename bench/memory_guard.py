"""Drive a vLLM over its KV cache, without and with the memory guard.

    python -m bench.memory_guard --vllm "vllm serve MODEL --num-gpu-blocks-override 400" --streams 64

In front of one vLLM, a proxy with the guard and one without take turns. In each turn `--streams`
clients ask for a completion of `--tokens` tokens, again and again, for `--seconds`; then the rest of the answers comes
in. A preemption is a running request whose KV cache vLLM throws away and computes again. Each turn reports the number
of preemptions, the tokens per second and the time per answer. Give vLLM a cache that holds a part of the clients'
requests: --num-gpu-blocks-override.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from bench import children
from bench.engines.results import spread
from bench.engines.session import free_port, until_ready
from bench.engines.subjects import OFFLINE
from bench.engines.table import Row, text
from xgen_proxy.models.conditions import conditions

NAME = "m"
WORDS = "the engine keeps what it has read of each request in blocks of its cache "


@dataclass(frozen=True)
class Turn:
    """`p50`, `p99`: of the time that an answer took, in seconds."""

    guard: bool
    answers: int
    failed: int
    preempted: int
    tok_s: float
    p50: float
    p99: float


async def drive(url: str, engine: str, options: argparse.Namespace, guard: bool) -> Turn:
    before, began = await preemptions(engine), time.perf_counter()
    latencies: list[float] = []
    failed = 0

    async def client(number: int) -> None:
        nonlocal failed
        turn = 0
        while time.perf_counter() - began < options.seconds:
            turn += 1
            prompt = f"{number} {turn} " + WORDS * (options.prompt // 14)
            asked = {"model": NAME, "prompt": prompt, "max_tokens": options.tokens, "ignore_eos": True}
            sent = time.perf_counter()
            answer = await session.post(f"{url}/v1/completions", json=asked)
            if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == options.tokens:
                latencies.append(time.perf_counter() - sent)
            else:
                failed += 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as session:
        await asyncio.gather(*(client(number) for number in range(options.streams)))
    seconds = time.perf_counter() - began
    cuts = statistics.quantiles(latencies, n=100)
    lost = int(await preemptions(engine) - before)
    return Turn(guard, len(latencies), failed, lost, len(latencies) * options.tokens / seconds, cuts[49], cuts[98])


async def preemptions(engine: str) -> float:
    async with httpx.AsyncClient(trust_env=False) as session:
        page = (await session.get(f"{engine}/metrics")).text
    return sum(float(count) for count in re.findall(r"^vllm:num_preemptions_total\{[^}]*\} (\S+)", page, re.M))


def version(engine: str) -> str:
    return str(httpx.get(f"{engine}/version", trust_env=False).raise_for_status().json()["version"])


def measure(options: argparse.Namespace, folder: Path) -> tuple[str, list[Turn]]:
    """The version of vLLM, and what came of each turn. Raises StartError."""
    with ExitStack() as stack:
        port = free_port()
        command = [*shlex.split(options.vllm), "--served-model-name", NAME, "--port", str(port)]
        log = folder / "vllm.log"
        engine = stack.enter_context(children.running(command, log, env=OFFLINE))
        url = f"http://127.0.0.1:{port}"
        until_ready(f"{url}/health", engine, log, 600)
        found, turns = version(url), []
        for repeat in range(options.repeats):
            for guard in (False, True) if repeat % 2 == 0 else (True, False):
                with proxy(url, guard, options, folder) as front:
                    turns.append(asyncio.run(drive(front, url, options, guard)))
                print(f"memory_guard: {turns[-1]}", file=sys.stderr, flush=True)
        return found, turns


@contextmanager
def proxy(engine: str, guard: bool, options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """A new proxy for each turn, so that none has learnt anything from the turn before. Raises StartError."""
    env = {
        "XGEN_BACKENDS__ENGINE__URLS": json.dumps([engine]),
        "XGEN_BACKENDS__ENGINE__DIALECT": "vllm",
        "XGEN_BACKENDS__ENGINE__SLOTS": str(options.streams),
        "XGEN_LIMITS__QUEUE_TIMEOUT_S": "600",
        "XGEN_MEMORY_GUARD__ENABLED": str(guard).lower(),
    }
    log = folder / "proxy.log"
    log.unlink(missing_ok=True)
    with children.running(children.PROXY, log, env=env) as process:
        port = children.listening_port(process, log)
        children.until_ready(port)
        yield f"http://127.0.0.1:{port}"
        print(*re.findall(r"takes .*", log.read_text())[:20], sep="\n", file=sys.stderr)


def table(turns: list[Turn]) -> Iterator[Row]:
    yield "guard", "answers", "failed", "preemptions", "preemptions per answer", "output tok/s", "p50, s", "p99, s"
    for guard in (False, True):
        own = [turn for turn in turns if turn.guard == guard]
        yield (
            "on" if guard else "off",
            spread(turn.answers for turn in own),
            str(sum(turn.failed for turn in own)),
            spread(turn.preempted for turn in own),
            spread((turn.preempted / turn.answers for turn in own), 2),
            spread(turn.tok_s for turn in own),
            spread((turn.p50 for turn in own), 1),
            spread((turn.p99 for turn in own), 1),
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory_guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--vllm", required=True, metavar="COMMAND", help="starts vLLM, with a small KV cache")
    flag("--streams", type=int, default=64, help="clients at once (%(default)s)")
    flag("--prompt", type=int, default=128, help="tokens per prompt, about (%(default)s)")
    flag("--tokens", type=int, default=256, help="per answer (%(default)s)")
    flag("--seconds", type=float, default=20, help="of each turn (%(default)s)")
    flag("--repeats", type=int, default=3, help="(%(default)s)")
    flag("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    children.end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        try:
            vllm, turns = measure(options, Path(folder))
        except children.StartError as error:
            print(f"memory_guard: {error}", file=sys.stderr)
            return 1
    print(text(table(turns)))
    if options.json:
        found = conditions(["python", "-m", "bench.memory_guard", *sys.argv[1:]])
        found["versions"]["vllm"] = vllm
        options.json.write_text(json.dumps({"conditions": found, "turns": [asdict(each) for each in turns]}, indent=1))
    return 1 if any(turn.failed for turn in turns) else 0


if __name__ == "__main__":
    sys.exit(main())
