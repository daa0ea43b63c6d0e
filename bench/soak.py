"""Run a long mixed load, and check that the proxy's memory does not grow and that it leaks no sockets, slots or files.

    python -m bench.soak --minutes 15 --plot soak.svg

The proxy runs as a process in front of two scripted upstreams (bench/upstream.py) that fail one request in ten: errors,
resets, cut streams, error events, stalls. Clients of many kinds come and go: streams and non-streaming requests, on
kept and new connections; some disconnect at any moment, some read slowly, some send garbage. RSS, open files and
sockets of the proxy are sampled each second. Afterwards its gauges must be 0, no client socket may be left, and only
idle upstream connections. The slope of RSS is a least-squares fit over the last two thirds, with its standard error,
since allocators settle in the first third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from bench import children, plot, processes

EXAMPLES = """\
examples:
  python -m bench.soak --minutes 15 --plot soak.svg
  a minute, to see that it works:
  python -m bench.soak --minutes 1 --clients 20
"""
# Short timeouts, so that a run contains many stalls.
SETTINGS = {
    "XGEN_BACKENDS__VLLM__IDLE_TIMEOUT_S": "2",
    "XGEN_BACKENDS__VLLM__FIRST_BYTE_TIMEOUT_S": "5",
    "XGEN_BACKENDS__VLLM__TOTAL_TIMEOUT_S": "30",
    "XGEN_BACKENDS__VLLM__SLOTS": "64",
}
FAULTS = "0.1"


@dataclass(frozen=True)
class Sample:
    """A sample. `clients`, `upstream`: the proxy's sockets to each."""

    at: float
    rss_mb: float
    files: int
    clients: int
    upstream: int


@dataclass
class Soak:
    samples: list[Sample] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)

    def settled(self) -> list[Sample]:
        """The samples of the last two thirds."""
        return self.samples[len(self.samples) // 3 :]

    def slope(self) -> tuple[float, float]:
        """(slope of RSS in MiB per hour, its standard error)"""
        x = [sample.at / 3600 for sample in self.settled()]
        y = [sample.rss_mb for sample in self.settled()]
        slope, intercept = statistics.linear_regression(x, y)
        residuals = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        middle = statistics.fmean(x)
        spread = sum((a - middle) ** 2 for a in x)
        return slope, (residuals / (len(x) - 2) / spread) ** 0.5

    def report(self) -> str:
        settled = self.settled()
        slope, error = self.slope()
        rows = [f"{sum(self.outcomes.values())} requests in {self.samples[-1].at:.0f} s"]
        rows += [f"  {count:8}  {outcome}" for outcome, count in self.outcomes.most_common()]
        rows.append(f"RSS: {settled[0].rss_mb:.1f} MiB after a third, {settled[-1].rss_mb:.1f} at the end;")
        rows.append(f"slope over the last two thirds {slope:+.2f} MiB/h, standard error {error:.2f}")
        for name in ("files", "clients", "upstream"):
            values = [getattr(sample, name) for sample in settled]
            half = len(values) // 2
            first, second = statistics.fmean(values[:half]), statistics.fmean(values[half:])
            rows.append(f"{LABELS[name]}: {min(values)} to {max(values)}, mean {first:.1f} then {second:.1f}")
        rows += [f"LEFT BEHIND: {each}" for each in self.left] or ["nothing left behind"]
        return "\n".join(rows)

    def draw(self, path: Path) -> None:
        minutes = [sample.at / 60 for sample in self.samples]
        counts = {LABELS[name]: [getattr(each, name) for each in self.samples] for name in LABELS}
        panels = {"RSS, MiB": {"RSS": [each.rss_mb for each in self.samples]}, "open": counts}
        slope, error = self.slope()
        title = f"{sum(self.outcomes.values())} requests; RSS {slope:+.2f} ± {error:.2f} MiB/h over the last two thirds"
        plot.lines(path, title, minutes, "minutes", panels)


LABELS = {"files": "open files", "clients": "client sockets", "upstream": "upstream sockets"}


class Client:
    """A client that sends one random request after another and ends each in a random way."""

    def __init__(self, port: int, seed: int, soak: Soak) -> None:
        self.port = port
        self.random = random.Random(seed)
        self.soak = soak
        self.connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        try:
            while True:
                await self._one()
                await asyncio.sleep(self.random.expovariate(2))
        finally:
            self._hang_up()

    async def _one(self) -> None:
        kind = self.random.choices(["patient", "leaves", "slow", "nonsense"], [70, 20, 5, 5])[0]
        try:
            reader, writer = await self._connected(small=kind == "slow")
            writer.write(self._nonsense() if kind == "nonsense" else self._request(kind))
            if kind == "leaves":
                await self._leave(reader)
            else:
                status = await self._read(reader, slowly=kind == "slow")
                self.soak.outcomes[f"{kind}: {status}"] += 1
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            self.soak.outcomes[f"{kind}: {type(error).__name__}"] += 1
            self._hang_up()
        if kind != "patient" or self.random.random() < 0.3:
            self._hang_up()

    async def _connected(self, small: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.connection is None:
            self.connection = await asyncio.open_connection("127.0.0.1", self.port, limit=4096 if small else 65536)
        return self.connection

    def _hang_up(self) -> None:
        if self.connection is not None:
            self.connection[1].transport.abort()
            self.connection = None

    def _request(self, kind: str) -> bytes:
        """Slow readers get long, fast streams, so that buffers fill up."""
        chunks, gap = (3000, 0) if kind == "slow" else (self.random.randint(1, 40), self.random.choice([0, 5, 25]))
        prompt = f"{gap} ms each:" + " word" * self.random.choice([0, 0, 50, 2000])
        body = {"model": "m", "max_tokens": chunks, "stream": kind == "slow" or self.random.random() < 0.6}
        if self.random.random() < 0.5:
            return post("/v1/completions", {**body, "prompt": prompt})
        return post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]})

    def _nonsense(self) -> bytes:
        return self.random.choice([
            b"nonsense\r\n\r\n",
            post("/v1/chat/completions", {"messages": 1}),
            post("/nowhere", {}),
            post("/v1/completions", {"model": "unknown", "prompt": "x"}),
            post("/v1/completions", {"prompt": "x" * 100_000})[:-10] + b"]]]]]]]]]]",
        ])  # fmt: skip

    async def _leave(self, reader: asyncio.StreamReader) -> None:
        """Disconnect at once, later, or after the first bytes."""
        if self.random.random() < 0.5:
            await asyncio.sleep(self.random.choice([0, 0.001, 0.01, 0.1]))
        else:
            await reader.read(self.random.randint(1, 2000))
        self.soak.outcomes["leaves"] += 1

    async def _read(self, reader: asyncio.StreamReader, slowly: bool) -> str:
        """The outcome: the status, and how a stream ended."""
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = head.split(b" ", 2)[1].decode()
        length = re.search(rb"content-length: (\d+)", head)
        if length:
            await reader.readexactly(int(length[1]))
            return status
        last = b""
        while size := int((await reader.readuntil(b"\r\n")).strip() or b"0", 16):
            last = (await reader.readexactly(size + 2))[-100:]
            if slowly:
                await asyncio.sleep(0.01)
        await reader.readexactly(2)
        return f"{status}, stream {'complete' if b'[DONE]' in last else 'broken'}"


def post(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def sample(began: float, pid: int, port: int, upstream: set[int]) -> Sample:
    sockets = processes.sockets(pid)
    clients = sum(1 for each in sockets if each.local == port and each.remote)
    backends = sum(1 for each in sockets if each.remote in upstream)
    return Sample(time.monotonic() - began, processes.rss_mb(pid), processes.open_files(pid), clients, backends)


async def churn(soak: Soak, port: int, pid: int, upstream: set[int], options: argparse.Namespace) -> None:
    clients = [
        asyncio.create_task(Client(port, options.seed * 1000 + number, soak).run()) for number in range(options.clients)
    ]
    began = time.monotonic()
    end = began + options.minutes * 60
    try:
        while time.monotonic() < end:
            soak.samples.append(sample(began, pid, port, upstream))
            if len(soak.samples) % 10 == 0:
                last, done = soak.samples[-1], soak.outcomes.total()
                progress(f"{last.at:.0f} s: {done} requests, {last.rss_mb:.1f} MiB, {last.files} open files")
            await asyncio.sleep(1)
            for task in clients:
                if task.done():
                    task.result()  # an exception in a client is a bug of this script
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


def leftovers(pid: int, port: int, upstream: set[int], seconds: float = 40) -> list[str]:
    """Slots, queued requests and sockets that are left after `seconds`, in which stalled upstreams time out."""
    deadline = time.monotonic() + seconds
    while True:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        gauges = re.findall(r"^(xgen_(?:replica_in_flight|queue_requests)\S*) (\S+)$", page, re.M)
        left = [f"{name} is {value}" for name, value in gauges if float(value)]
        for each in processes.sockets(pid):
            client = each.local == port and each.remote
            half_closed = each.remote in upstream and each.state != "ESTABLISHED"
            if client or half_closed:
                left.append(f"socket {each.local} -> {each.remote} {each.state}")
        if not left or time.monotonic() > deadline:
            return left if gauges else ["no gauges found"]
        time.sleep(0.5)


def run(options: argparse.Namespace, folder: Path) -> Soak:
    soak = Soak()
    with ExitStack() as stack:
        ports = []
        for number in (1, 2):
            log = folder / f"upstream-{number}.log"
            command = [*children.UPSTREAM, "--faults", FAULTS, "--seed", str(options.seed * 10 + number)]
            ports.append(children.listening_port(stack.enter_context(children.running(command, log)), log))
        log = folder / "proxy.log"
        urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
        proxy = stack.enter_context(children.running([*children.PROXY, "--vllm", urls], log, env=SETTINGS))
        port = children.listening_port(proxy, log)
        children.until_ready(port)
        uvloop.run(churn(soak, port, proxy.pid, set(ports), options))
        soak.left = leftovers(proxy.pid, port, set(ports))
        if proxy.poll() is not None:
            soak.left.append(f"the proxy ended with {proxy.returncode}")
        soak.left += [line for line in log.read_text().splitlines() if "Traceback" in line][:5]
    return soak


def progress(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=60, help="concurrent clients (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=plot.picture, metavar="FILE.svg", help="needs matplotlib")
    options = parser.parse_args()
    children.end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        soak = run(options, Path(folder))
    print(soak.report())
    if options.plot:
        soak.draw(options.plot)
    return 1 if soak.left else 0


if __name__ == "__main__":
    sys.exit(main())
