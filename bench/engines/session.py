"""One start of one engine: its servers, the proxy in front, and the loads, each direct and through the proxy."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import children, processes
from bench.engines import load
from bench.engines.results import DIRECT, PROXY, Level, Results, Run
from bench.engines.subjects import Subject

# The least number of requests for a percentile to say anything, and the most that a level needs.
FEWEST, MOST = 3, 1024
WAVES = 4  # of a closed level, if the time allows: the first alone shows how the engine takes a burst
LEAST_S = 20  # that a start of an engine is used for, however long it took
QUEUEING_S = 600  # that a request may wait in the proxy, and then for its first token


class Sampler:
    """Peak memory and mean GPU use of a load, sampled by a thread."""

    def __init__(self, pids: list[int], every: float = 0.5) -> None:
        self.pids, self.every, self.ended = pids, every, threading.Event()
        self.rss = self.gpu_mb = 0.0
        self.use: list[float] = []
        self.has_gpu = shutil.which("nvidia-smi") is not None
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _sample(self) -> None:
        while True:
            self.rss = max(self.rss, sum(processes.rss_mb(pid) for pid in self.pids))
            if self.has_gpu:
                memory, use = gpu_now()
                self.gpu_mb = max(self.gpu_mb, memory)
                self.use.append(use)
            if self.ended.wait(self.every):
                return


def gpu_now() -> tuple[float, float]:
    """MiB in use and percent busy, over all GPUs."""
    command = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    rows = [[float(cell) for cell in line.split(",")] for line in lines]
    return sum(row[0] for row in rows), sum(row[1] for row in rows) / max(1, len(rows))


@dataclass
class Session:
    """A running engine. `urls`: where it is reached; direct only if it is one server."""

    options: argparse.Namespace
    subject: Subject
    client: load.Client
    results: Results
    engines: list[int]
    proxy: int
    urls: dict[str, str]
    ends: float  # on time.monotonic's clock

    def measure(self, where: str, level: Level, repeat: int) -> None:
        """Measure a level, unless it was measured before. Leaves it out, and says so, if it would take too long."""
        if where not in self.urls or self.results.done(self.subject.name, where, level, repeat):
            return
        requests, rate, expected = self.planned(level)
        left = self.ends - time.monotonic()
        if expected > min(self.options.load_seconds, left):
            why = (
                f"would take {expected:.0f} s, and {min(self.options.load_seconds, max(0, left)):.0f} s are left for it"
            )
            self.results.skip(self.subject.name, where, level.name, repeat, why)
            progress(f"{self.subject.name}, {where}, {level.name}: left out: it {why}")
            return
        self.results.add(self.run(where, level, repeat, requests, rate))

    def planned(self, level: Level) -> tuple[int, float | None, float]:
        """The number of requests, the rate of an open load, and the seconds that they will take.

        The first run of a load fixes the number, so that all runs of it have as many requests, and direct and proxied
        runs of a repeat the same prompts.
        """
        name = self.subject.name
        if level.share:
            rate = level.share * (self.results.capacity(name) or 1)
            before = self.results.newest(name, level, rate)
            requests = before.requests if before else max(FEWEST, math.ceil(rate * self.options.open_seconds))
            return requests, rate, requests / min(rate, rate / level.share)
        assert level.streams
        pace = expected_pace([run for run in self.results.runs if run.subject == name], level.streams)
        before = self.results.newest(name, level, None)
        requests = before.requests if before else waves(level, pace * self.options.closed_seconds)
        return requests, None, requests / pace if pace else 0.0

    def run(self, where: str, level: Level, repeat: int, requests: int, rate: float | None) -> Run:
        engine, proxy = self.cpu(), processes.cpu_seconds(self.proxy)
        seed = self.options.seed + repeat
        with Sampler(self.engines) as sampler:
            saved = self.client.run(self.urls[where], self.subject, level, requests, rate, seed)
        run = Run(
            self.subject.name, where, level, repeat, rate=rate, rss_mb=sampler.rss, cpu_s=self.cpu() - engine,
            gpu_mb=sampler.gpu_mb if sampler.has_gpu else None,
            gpu_use=sum(sampler.use) / len(sampler.use) if sampler.use else None,
            proxy_cpu_s=processes.cpu_seconds(self.proxy) - proxy if where == PROXY else None,
            **load.figures(saved, requests, self.options.output_len),
        )  # fmt: skip
        progress(
            f"{run.subject}, {where}, {level.name}: {run.output_tok_s:.0f} tok/s, TTFT p50 {run.ttft['p50']:.0f} ms, "
            f"{run.failed} of {requests} failed, {run.seconds:.0f} s"
        )
        return run

    def cpu(self) -> float:
        return sum(processes.cpu_seconds(pid) for pid in self.engines)


def waves(level: Level, affordable: float) -> int:
    """The requests of a closed load: whole waves, as many as are affordable (0: it is not known), and at least one."""
    assert level.streams
    # Of prompts that begin alike, the generator makes equally many for each beginning.
    wave = math.lcm(level.streams, load.PREFIXES) if level.shared_prefix else level.streams
    most = min(WAVES * level.streams, MOST)
    wanted = min(most, affordable) if affordable else most
    return wave * max(math.ceil(FEWEST / wave), int(wanted // wave))


def expected_pace(runs: Sequence[Run], streams: int) -> float:
    """Requests per second at so many streams, from what smaller closed loads did; 0 if there were none.

    From the two largest of them it is known how the pace grows with the streams: not at all where requests run one at
    a time, in proportion while a batch has room. After a single load, growth in proportion is assumed.
    """
    best: dict[int, float] = {}
    for run in runs:
        if run.level.streams and run.level.streams <= streams and run.req_s:
            best[run.level.streams] = max(run.req_s, best.get(run.level.streams, 0.0))
    if not best:
        return 0.0
    *smaller, last = sorted(best)
    growth = 1.0
    if smaller and last < streams:
        before = smaller[-1]
        growth = math.log(best[last] / best[before]) / math.log(last / before)
    return best[last] * math.pow(streams / last, min(1.0, max(0.0, growth)))


@contextmanager
def session(
    options: argparse.Namespace, subject: Subject, client: load.Client, results: Results, folder: Path, ends: float
) -> Iterator[Session]:
    """Start the engine and the proxy, and send a few requests both ways. Raises StartError."""
    with ExitStack() as stack:
        began = time.monotonic()
        progress(f"starting {subject.name}")
        engines, urls = [], []
        for number, server in enumerate(subject.servers):
            port = free_port()
            log = fresh(folder / f"{subject.name}-{number}.log")
            command = [part.replace("{port}", str(port)) for part in server.command]
            engine = stack.enter_context(children.running(command, log, env=server.env))
            urls.append(f"http://127.0.0.1:{port}")
            until_ready(urls[-1] + subject.ready, engine, log, options.start_seconds)
            engines.append(engine)
        results.starts_s.setdefault(subject.name, []).append(time.monotonic() - began)
        results.subjects[subject.name] = subject.described()
        log = fresh(folder / f"{subject.name}-proxy.log")
        # Many at once wait longer for a slow engine than the default timeouts allow, which would count them as failed.
        values = {"URLS": json.dumps(urls), "DIALECT": subject.dialect, "FIRST_BYTE_TIMEOUT_S": str(QUEUEING_S)}
        env = {f"XGEN_BACKENDS__ENGINE__{name}": value for name, value in values.items()}
        env["XGEN_LIMITS__QUEUE_TIMEOUT_S"] = str(QUEUEING_S)
        proxy = stack.enter_context(children.running(children.PROXY, log, env=env))
        port = children.listening_port(proxy, log)
        children.until_ready(port)
        reached = {PROXY: f"http://127.0.0.1:{port}"}
        if len(urls) == 1 and subject.direct:
            reached = {DIRECT: urls[0], **reached}
        made = Session(
            options, subject, client, results, [each.pid for each in engines], proxy.pid,
            {where: reached[where] for where in options.where if where in reached},
            max(ends, time.monotonic() + LEAST_S),
        )  # fmt: skip
        for url in made.urls.values():  # the first requests compile kernels and open connections
            streams = options.warm_up
            client.run(url, subject, Level(streams), streams, None, options.seed - 1)
        yield made
    if shutil.which("nvidia-smi"):  # the driver frees the memory of killed processes a little later
        deadline = time.monotonic() + 30
        while gpu_now()[0] > 4096 and time.monotonic() < deadline:
            time.sleep(0.5)


def until_ready(url: str, engine: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and engine.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.2)
    why = "ended" if engine.poll() is not None else f"is not ready after {seconds:g} s"
    raise children.StartError(f"{log.stem} {why}; its log ends:\n{log.read_text(errors='replace')[-3000:]}")


def fresh(log: Path) -> Path:
    """The log without what an earlier start wrote."""
    log.unlink(missing_ok=True)
    return log


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def progress(text: str) -> None:
    print(f"engines: {text}", file=sys.stderr, flush=True)
