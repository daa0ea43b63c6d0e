"""Measure many paced streams at once: errors, memory and CPU of the proxy, and the delay it adds to each chunk.

    python -m bench.streams --streams 1000 --gap-ms 250

A scripted upstream (bench/upstream.py) sends one chunk per `gap` on every stream and writes the time into it; a client
in another process reads the same clock when the chunk arrives. Rounds alternate between direct and through the proxy;
the difference is what the proxy adds. 1,000 streams at 250 ms are 4,000 chunks a second. At 10 ms they would be
100,000, more than two cores can send and read. Streams start spread over one gap, as independent clients would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import ssl
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from bench import children, processes

EXAMPLES = """\
examples:
  the default: 1,000 streams of 100 chunks, three rounds, proxy on core 0, upstream and client on core 1
    python -m bench.streams
  on a machine with more cores, faster:
    python -m bench.streams --gap-ms 50 --subject-cores 2 --upstream-cores 4 --client-cores 6
"""
SENT = re.compile(rb'"text":"(\d+) "')
DONE = b"data: [DONE]\n\n"


@dataclass
class Round:
    """One load. `delays`: milliseconds of each chunk."""

    delays: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    cpu_us_per_chunk: float = 0.0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.delays)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Reader(asyncio.Protocol):
    """One stream. All chunks of a read get the same arrival time, taken before parsing."""

    def __init__(self, request: bytes, chunks: int, result: Round) -> None:
        self.request = request
        self.chunks = chunks
        self.result = result
        self.seen = 0
        self.tail = b""
        self.head = b""
        self.done = False
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.head = self.head or data[:12]
        text = self.tail + data
        end = 0
        for match in SENT.finditer(text):
            self.result.delays.append((now - int(match[1])) / 1e6)
            self.seen += 1
            end = match.end()
        self.tail = text[max(end, len(text) - 400) :]  # longer than an event
        if DONE in self.tail:
            self.done = True
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not (self.done and self.seen == self.chunks and self.head == b"HTTP/1.1 200"):
            self.result.errors.append(f"{self.head!r}: {self.seen} of {self.chunks} chunks, {exc}")
        self.closed.set_result(None)


def request(chunks: int, gap_ms: float) -> bytes:
    body = json.dumps({"model": "m", "prompt": f"{gap_ms:g} ms each:", "max_tokens": chunks, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


async def load(
    port: int, streams: int, chunks: int, gap_ms: float, result: Round, tls: ssl.SSLContext | None = None
) -> None:
    loop = asyncio.get_running_loop()
    starts = random.Random(1)
    content = request(chunks, gap_ms)
    name = "localhost" if tls else None

    async def one() -> None:
        await asyncio.sleep(starts.uniform(0, max(1.0, gap_ms / 1000)))  # not 1,000 connections at once
        try:
            _, reader = await loop.create_connection(
                lambda: Reader(content, chunks, result), "127.0.0.1", port, ssl=tls, server_hostname=name
            )
        except OSError as error:
            result.errors.append(repr(error))
            return
        await reader.closed

    await asyncio.gather(*(one() for _ in range(streams)))


async def watch(pid: int, result: Round) -> None:
    while True:
        result.peak_rss_mb = max(result.peak_rss_mb, processes.rss_mb(pid))
        await asyncio.sleep(0.5)


async def measure(port: int, options: argparse.Namespace, pid: int | None) -> Round:
    """Run one load. `pid`: the proxy's; None if the load goes to the upstream directly."""
    result = Round()
    before = processes.cpu_seconds(pid) if pid else 0.0
    watching = asyncio.create_task(watch(pid, result)) if pid else None
    await load(port, options.streams, options.chunks, options.gap_ms, result)
    if pid and watching:
        watching.cancel()
        result.cpu_us_per_chunk = (processes.cpu_seconds(pid) - before) / max(1, len(result.delays)) * 1e6
    return result


def run(options: argparse.Namespace, folder: Path) -> tuple[list[Round], list[Round]]:
    """(direct, through) rounds, one of each per repeat."""
    with ExitStack() as stack:
        log = folder / "upstream.log"
        upstream = children.listening_port(
            stack.enter_context(children.running(children.UPSTREAM, log, options.upstream_cores)), log
        )
        log = folder / "proxy.log"
        command = [*children.PROXY, "--vllm", f"http://127.0.0.1:{upstream}"]
        slots = {"XGEN_BACKENDS__VLLM__SLOTS": str(options.streams)}
        proxy = stack.enter_context(children.running(command, log, options.subject_cores, slots))
        port = children.listening_port(proxy, log)
        children.until_ready(port)
        direct: list[Round] = []
        through: list[Round] = []
        for number in range(options.repeats):
            turns = [("direct", direct, upstream, None), ("through", through, port, proxy.pid)]
            for name, rounds, where, pid in turns if number % 2 == 0 else reversed(turns):
                progress(f"{name}, {number + 1} of {options.repeats}")
                rounds.append(uvloop.run(measure(where, options, pid)))
        return direct, through


def progress(text: str) -> None:
    print(f"streams: {text}", file=sys.stderr, flush=True)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def delays(direct: list[Round], through: list[Round]) -> list[str]:
    """The added delay is the difference of the two rounds of a repeat."""
    lines = []
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        added = [b.percentile(share) - a.percentile(share) for a, b in zip(direct, through, strict=True)]
        for what, values in (
            ("direct", [each.percentile(share) for each in direct]),
            ("through", [each.percentile(share) for each in through]),
            ("added", added),
        ):
            lines.append(f"{f'chunk delay {name}, {what}':24}  {spread(values, 2)} ms")
    return lines


def report(options: argparse.Namespace, direct: list[Round], through: list[Round]) -> str:
    rate = options.streams / options.gap_ms * 1000
    lines = [
        f"{options.streams} streams, {options.chunks} chunks each, one each {options.gap_ms:g} ms: {rate:.0f} chunks/s;"
        f" median (least to most) of {options.repeats} rounds\n"
    ]
    lines += delays(direct, through)
    lines.append(f"{'proxy peak RSS':24}  {spread([each.peak_rss_mb for each in through], 0)} MiB")
    lines.append(f"{'proxy CPU':24}  {spread([each.cpu_us_per_chunk for each in through], 1)} us/chunk")
    for name, rounds in (("direct", direct), ("through", through)):
        errors = [error for each in rounds for error in each.errors]
        lines.append(f"{f'errors, {name}':24}  {len(errors)}" + "".join(f"\n  {error}" for error in errors[:5]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=100, help="per stream (%(default)s)")
    parser.add_argument("--gap-ms", type=float, default=250, help="between two chunks of a stream (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--subject-cores", default="0", help="cores of the proxy, in taskset's notation (%(default)s)")
    parser.add_argument("--upstream-cores", default="1")
    parser.add_argument("--client-cores", default="1")
    options = parser.parse_args()
    children.end_on_sigterm()
    children.pin(options.client_cores)
    with tempfile.TemporaryDirectory() as folder:
        direct, through = run(options, Path(folder))
    print(report(options, direct, through))
    return 1 if any(each.errors for each in direct + through) else 0


if __name__ == "__main__":
    sys.exit(main())
