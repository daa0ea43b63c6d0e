"""Kill, hang and restart vLLM under mixed load, with real vLLM and llama.cpp servers behind a real proxy.

    python -m bench.chaos --seed 1 --requests 200 --vllm PATH/TO/vllm --vllm-model DIR --gguf FILE

Shows that no request is lost. A seeded mix (chat and completions, streams and non-streaming, short and long prompts,
8 to 60 tokens, 12 at once) runs all the time. At seeded moments, while it has requests, vLLM's engine is killed, its
API server is killed, its engine is stopped so that it hangs, and it gets a SIGTERM. Each time it is restarted while
requests continue. One request in five is hostile (bench/hostile.py). bench/judge.py checks every answer to the others.
Afterwards every replica must be up, and no slot, queued request or socket may be left. Exits with 1 unless every
request that is not hostile completed and nothing is left.

The seed determines the requests, and the order and moments of the events, counted in requests; the engines' own timing
varies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench import children, hostile, processes
from bench.judge import judge_stream, judge_whole
from tests.support import real_servers as servers
from tests.support.real_servers import MODEL, Server
from tests.support.waiting import wait_until

EXAMPLES = """\
examples:
  all events, about 6 minutes:
    python -m bench.chaos --seed 1 --requests 200 --vllm .venv-vllm/bin/vllm --vllm-model models/smollm2-hf \\
        --gguf models/SmolLM2-135M-Instruct.Q4_1.gguf
  one event, with the default CPU backend:
    python -m bench.chaos --requests 40 --events kill-engine --engine llama-cpp-python
The variables XGEN_TEST_VLLM, XGEN_TEST_VLLM_MODEL and XGEN_TEST_GGUF replace --vllm, --vllm-model and --gguf.
"""
CONCURRENCY = 12
# Pauses before vLLM is restarted. A hung engine stays longer than the proxy's timeouts.
RUIN_S = {"kill-engine": 3.0, "kill-api": 3.0, "hang-engine": 30.0, "terminate": 10.0}
EVENTS = tuple(RUIN_S)
PREY, PREY_S = 2, 30.0  # an event waits this long for this many streams to cut, then strikes anyway
ARRIVAL_S = 0.5  # mean time between requests, while fewer than CONCURRENCY run: 12 prompts at once overload a CPU
RESTART_S = 45.0  # restart time of vLLM, measured 35 to 60; it only sets the pace
HOSTILE = 0.25  # hostile requests for each good one, so one in five of all
HUNG_S = 300.0  # a request that takes longer is lost: the queue, all timeouts and the generation take less
# Short, so that a hang is found within the storm; the CPU build takes up to a second from chunk to chunk of 12 streams.
TIMEOUTS = {
    "XGEN_BACKENDS__VLLM__IDLE_TIMEOUT_S": "4",
    "XGEN_BACKENDS__VLLM__FIRST_BYTE_TIMEOUT_S": "15",
    "XGEN_BACKENDS__VLLM__TOTAL_TIMEOUT_S": "60",
    # Both engines share two cores: while vLLM is down all requests wait for llama.cpp, which is no loss.
    "XGEN_LIMITS__QUEUE_TIMEOUT_S": "180",
    "XGEN_LOG_FORMAT": "json",
}
OUTCOMES = ("complete", "continued", "failed over", "4xx", "5xx", "error event", "malformed", "cut", "hung")
GOOD = OUTCOMES[:3]

TOPICS = ("a river", "the sea", "a bridge", "bread", "the moon", "a library", "winter", "an old clock", "a train")
FILLER = "The town lies at a bend of the river, and its people have lived from fishing and from trade for long. "
LONG = FILLER * 7  # 140 words


@dataclass
class Request:
    number: int
    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body["stream"])

    @property
    def kind(self) -> str:
        return f"{'chat' if 'messages' in self.body else 'completions'}, {'stream' if self.stream else 'whole'}"


@dataclass
class Answer:
    """The result of a request. `wrong`: empty if complete. `attempts`: the X-Attempts header, set before the body."""

    request: Request
    outcome: str
    wrong: str
    backend: str
    attempts: int
    began: float
    seconds: float


@dataclass
class Strike:
    """One event. `busy`: requests on vLLM at that time. `streaming`: those that had sent part of their answer.

    Times are seconds since the start. `restored`: vLLM answers again.
    """

    name: str
    at: float
    busy: int
    streaming: int
    restored: float = 0.0


@dataclass
class Storm:
    """The results of a run."""

    seed: int
    answers: list[Answer] = field(default_factory=list)
    strikes: list[Strike] = field(default_factory=list)
    hostile: Counter[str] = field(default_factory=Counter)  # hostile requests by kind
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def lost(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.outcome not in GOOD]

    @property
    def ok(self) -> bool:
        return not self.lost and not self.left and not self.missed

    @property
    def missed(self) -> list[Strike]:
        """Events during which vLLM had no requests, so that they prove nothing."""
        return [strike for strike in self.strikes if not strike.busy]

    def report(self) -> str:
        lines = [f"seed {self.seed}: {len(self.answers)} requests, {self.seconds:.0f} s", "", self._table(), ""]
        lines += [
            f"{strike.at:6.1f} s  {strike.name} with {strike.busy} requests on vLLM, {strike.streaming} amid a stream;"
            f" back at {strike.restored:.1f} s"
            for strike in self.strikes
        ]
        lines += [
            f"LOST #{answer.request.number} ({answer.request.kind}, {answer.backend}, began at {answer.began:.1f} s,"
            f" {answer.seconds:.1f} s): {answer.wrong}"
            for answer in self.lost
        ]
        lines += [f"LEFT BEHIND: {each}" for each in self.left]
        lines += [f"MISSED: {strike.name} at {strike.at:.1f} s hit no request" for strike in self.missed]
        complete = len(self.answers) - len(self.lost)
        lines += ["", f"{self.hostile.total()} hostile requests of {len(self.hostile)} kinds"]
        lines += [f"{complete} of {len(self.answers)} complete, {len(self.left)} things left behind"]
        return "\n".join(lines)

    def _table(self) -> str:
        rows = [["", *OUTCOMES, "all"]]
        for kind in [*sorted({answer.request.kind for answer in self.answers}), "all"]:
            count = Counter(answer.outcome for answer in self.answers if kind in (answer.request.kind, "all"))
            rows.append([kind, *(str(count[outcome]) for outcome in OUTCOMES), str(count.total())])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)


def make_request(number: int, random: random.Random) -> Request:
    words = f"Write about {random.choice(TOPICS)}, number {number}."
    # More or less than 100 words. Long prompts begin with the same text, so that an engine reads it once: a shared CPU
    # reads 30 tokens a second.
    prompt = LONG + words if random.random() < 0.25 else words
    body: dict[str, Any] = {"model": MODEL, "max_tokens": random.randint(8, 60), "stream": random.random() < 0.6}
    body |= {"temperature": random.choice([0, 0.7]), "seed": number}
    if body["stream"] and random.random() < 0.4:
        body["stream_options"] = {"include_usage": True}
    if random.random() < 0.6:
        return Request(number, "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]})
    return Request(number, "/v1/completions", {**body, "prompt": prompt})


def warm(vllm: Server) -> None:
    """Warm up: the first requests on the CPU build take longer than the timeouts here allow."""
    for number in (-1, -2):
        for path, prompt in (
            ("/v1/completions", {"prompt": f"{LONG}{number}"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"{LONG}{number}"}]}),
        ):
            body = {"model": MODEL, **prompt, "max_tokens": 4}
            httpx.post(vllm.url + path, json=body, timeout=HUNG_S).raise_for_status()


class Saboteur:
    """Injects one failure into vLLM at a time and restarts it."""

    def __init__(self, vllm: Server, proxy_url: str) -> None:
        self.vllm = vllm
        self.proxy_url = proxy_url

    def engine(self) -> int:
        """The process id of the engine. Raises AssertionError if there is none."""
        assert self.vllm.process
        for pid in servers.members(self.vllm.process.pid):
            if "EngineCore" in " ".join(psutil.Process(pid).cmdline()):
                return pid
        raise AssertionError("vLLM has no process named EngineCore")

    def strike(self, event: str) -> None:
        assert self.vllm.process
        if event == "kill-engine":
            os.kill(self.engine(), signal.SIGKILL)
        elif event == "kill-api":
            os.kill(self.vllm.process.pid, signal.SIGKILL)
        elif event == "hang-engine":
            os.kill(self.engine(), signal.SIGSTOP)
        else:
            os.kill(self.vllm.process.pid, signal.SIGTERM)

    def restore(self) -> None:
        """Kill what is left of vLLM, start it, and wait until the proxy knows that it is up."""
        self.vllm.kill9()
        self.vllm.start().wait_ready()
        warm(self.vllm)
        wait_until(lambda: self.replica()["up"], 30, "the proxy to see vLLM again")

    def replica(self) -> dict[str, Any]:
        status = httpx.get(self.proxy_url + "/models/status", timeout=10).json()
        return next(dict(each["replicas"][0]) for each in status["backends"] if each["name"] == "vllm")


class Client:
    """Sends requests and checks the answers. `streaming`: requests with an unfinished stream from vLLM."""

    def __init__(self, url: str, storm: Storm, began: float) -> None:
        self.storm = storm
        self.began = began
        self.started = 0
        self.streaming: set[int] = set()
        self.prey = asyncio.Event()  # set while at least PREY streams can be cut
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)

    async def send(self, request: Request) -> None:
        self.started += 1
        began = time.monotonic()
        headers: httpx.Headers = httpx.Headers()
        try:
            async with asyncio.timeout(HUNG_S):
                wrong, headers = await self._exchange(request)
            outcome = outcome_of(wrong, headers)
        except TimeoutError:
            outcome = wrong = "hung"
        except httpx.HTTPError as error:
            outcome, wrong = "cut", f"{error!r}"
        self.storm.answers.append(
            Answer(
                request, outcome, wrong, headers.get("x-backend", "none"), int(headers.get("x-attempts", 0)),
                began - self.began, time.monotonic() - began,
            )
        )  # fmt: skip

    async def attack(self, kind: str, steps: list[hostile.Step]) -> None:
        self.storm.hostile[kind] += 1
        await hostile.attack(self.http.base_url.port or 80, steps)

    async def _exchange(self, request: Request) -> tuple[str, httpx.Headers]:
        headers = {"x-request-id": request_id(request)}
        async with self.http.stream("POST", request.path, json=request.body, headers=headers) as answer:
            on_vllm = request.stream and answer.headers.get("x-backend") == "vllm"
            with self._counted(request) if on_vllm else nullcontext():
                body = await answer.aread()
        judge = judge_stream if request.stream else judge_whole
        return judge(answer.status_code, body, request.body), answer.headers

    @contextmanager
    def _counted(self, request: Request) -> Iterator[None]:
        self.streaming.add(request.number)
        if len(self.streaming) >= PREY:
            self.prey.set()
        try:
            yield
        finally:
            self.streaming.discard(request.number)
            if len(self.streaming) < PREY:
                self.prey.clear()


def request_id(request: Request) -> str:
    return f"chaos-{request.number}"


def outcome_of(wrong: str, headers: httpx.Headers) -> str:
    if not wrong:
        return "failed over" if int(headers.get("x-attempts", 1)) > 1 else "complete"
    if re.match(r"[45]\d\d:", wrong):
        return f"{wrong[0]}xx"
    return "error event" if wrong.startswith("error event") else "malformed"


def mark_continued(storm: Storm, log: Path) -> None:
    """Mark resumed answers: the log has more failed attempts than their headers, which were sent before the break."""
    failed: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            record = json.loads(line)
            failed[record.get("request_id", "")] += record["message"] == "attempt failed"
    for answer in storm.answers:
        if answer.outcome in GOOD and failed[request_id(answer.request)] >= max(answer.attempts, 1):
            answer.outcome = "continued"


class Director:
    """Spreads the requests over the events. Each event strikes when a seeded part of its share has been sent. Of the
    rest, half are sent around that moment, and half while vLLM restarts."""

    def __init__(self, storm: Storm, client: Client, saboteur: Saboteur, requests: int, events: list[str]) -> None:
        self.storm, self.client, self.saboteur = storm, client, saboteur
        self.events = events
        self.random = random.Random(storm.seed)
        self.requests = [make_request(number, self.random) for number in range(requests)]
        self.attacks = hostile.requests(random.Random(storm.seed))
        self.busy = asyncio.Semaphore(CONCURRENCY)
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        share = len(self.requests) // len(self.events)
        for index, event in enumerate(self.events):
            last = index == len(self.events) - 1
            part = self.requests[index * share :] if last else self.requests[index * share : (index + 1) * share]
            await self._act(event, part)
        await asyncio.gather(*self.tasks)

    async def _act(self, event: str, part: list[Request]) -> None:
        before = int(len(part) * self.random.uniform(0.3, 0.5))
        around = before + (len(part) - before) // 2
        await self._send(part[:before], ARRIVAL_S)
        striking = asyncio.create_task(self._strike(event, self.random.uniform(0, 1.5)))
        await self._send(part[before:around], ARRIVAL_S)
        strike = await striking
        restoring = asyncio.create_task(self._restore(strike))
        await self._send(part[around:], RESTART_S / max(1, len(part) - around))
        await restoring

    async def _send(self, requests: list[Request], gap: float = 0.0) -> None:
        for request in requests:
            await self.busy.acquire()
            task = asyncio.create_task(self.client.send(request))
            self.tasks.add(task)
            task.add_done_callback(lambda _: self.busy.release())
            if self.random.random() < HOSTILE:
                self.tasks.add(asyncio.create_task(self.client.attack(*next(self.attacks))))
            await asyncio.sleep(gap * self.random.uniform(0.5, 1.5))

    async def _strike(self, event: str, delay: float) -> Strike:
        """Strike when vLLM has streams that clients have begun to receive."""
        await asyncio.sleep(delay)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.client.prey.wait(), PREY_S)
        busy = (await asyncio.to_thread(self.saboteur.replica))["in_flight"]
        strike = Strike(event, time.monotonic() - self.client.began, busy, len(self.client.streaming))
        self.storm.strikes.append(strike)
        self.saboteur.strike(event)
        progress(f"{strike.at:.1f} s: {event}, {strike.busy} requests on vLLM, {strike.streaming} amid a stream")
        return strike

    async def _restore(self, strike: Strike) -> None:
        await asyncio.sleep(RUIN_S[strike.name])
        await asyncio.to_thread(self.saboteur.restore)
        strike.restored = time.monotonic() - self.client.began
        progress(f"{strike.restored:.1f} s: vLLM answers again")


def progress(text: str) -> None:
    print(f"chaos: {text}", file=sys.stderr, flush=True)


async def tell(client: Client, total: int) -> None:
    while True:
        await asyncio.sleep(5)
        done, lost = len(client.storm.answers), len(client.storm.lost)
        at = time.monotonic() - client.began
        progress(f"{at:.0f} s: {client.started} of {total} sent, {done} answered, {lost} lost")


async def blow(storm: Storm, url: str, requests: int, events: list[str], vllm: Server) -> None:
    began = time.monotonic()
    client = Client(url, storm, began)
    director = Director(storm, client, Saboteur(vllm, url), requests, events)
    telling = asyncio.create_task(tell(client, requests))
    try:
        await director.run()
    finally:
        telling.cancel()
        await client.http.aclose()
    storm.seconds = time.monotonic() - began


def gauges(url: str) -> dict[str, float]:
    """The gauges that must be 0 when the proxy is idle."""
    page = httpx.get(url + "/metrics", timeout=10).text
    found = re.findall(r"^(xgen_(?:replica_in_flight|queue_requests)\S*) (\S+)$", page, re.M)
    assert found, "no such gauges"
    return {name: float(value) for name, value in found}


def leftovers(find: Callable[[], list[str]], seconds: float) -> list[str]:
    """What `find` still returns after `seconds`; empty as soon as it returns nothing."""
    deadline = time.monotonic() + seconds
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def held_slots(url: str) -> list[str]:
    return [f"{name} is {value:g}" for name, value in gauges(url).items() if value]


def down_replicas(url: str) -> list[str]:
    status = httpx.get(url + "/models/status", timeout=10).json()
    replicas = [replica for backend in status["backends"] for replica in backend["replicas"]]
    return [f"{each['name']} is {each['state']}: {each['reason']}" for each in replicas if not each["up"]]


def held_sockets(pid: int, ports: set[int]) -> list[str]:
    """Sockets of ended backends and clients. SYN_SENT is a health check of a dead backend."""
    return [
        f"socket {each.local} -> {each.remote} {each.state}"
        for each in processes.sockets(pid)
        if each.remote and each.state != "SYN_SENT" and (each.remote in ports or each.local in ports)
    ]


def run(
    seed: int,
    requests: int,
    events: list[str],
    vllm: Server,
    llama: Server,
    folder: Path,
    after: Callable[[], None] | None = None,
) -> Storm:
    """Run the load on running servers with a proxy of its own; vLLM runs again afterwards. `after` is called
    between the last answer and the count of sockets: if it stops the backends, the count is exact."""
    storm = Storm(seed)
    log = folder / f"chaos-proxy-{seed}.log"
    log.unlink(missing_ok=True)  # the port is read from it
    flags = ["--vllm", vllm.url, "--llama-cpp", llama.url, "--engine", llama.name]
    proxy = servers.proxy(log, *flags, env=TIMEOUTS)
    try:
        proxy.start().wait_ready()
        saboteur = Saboteur(vllm, proxy.url)
        wait_until(lambda: saboteur.replica()["up"], 30, "the proxy to see vLLM")
        warm(vllm)
        asyncio.run(blow(storm, proxy.url, requests, events, vllm))
        mark_continued(storm, log)
        storm.left += leftovers(lambda: held_slots(proxy.url), 5)
        storm.left += leftovers(lambda: down_replicas(proxy.url), 5)
        ports = {proxy.port}
        if after:
            after()
            ports |= {vllm.port, llama.port}
        assert proxy.process
        pid = proxy.process.pid
        storm.left += leftovers(lambda: held_sockets(pid, ports), 10)
    finally:
        proxy.stop()
    return storm


def start_all(options: argparse.Namespace, folder: Path, stack: ExitStack) -> tuple[Server, Server]:
    llama_log = folder / "llama.log"
    starter: Callable[..., Server] = (
        servers.llama_server if options.engine == "llama-server" else servers.llama_cpp_python
    )
    llama = starter(llama_log, options.gguf)
    vllm = servers.vllm(folder / "vllm.log", options.vllm, options.vllm_model)
    for server in (llama, vllm):
        stack.callback(server.kill9)
        progress(f"starting {server.name}")
        server.start()
    for server in (llama, vllm):
        server.wait_ready()
    return vllm, llama


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=200, help="in all (%(default)s)")
    parser.add_argument(
        "--events", nargs="+", choices=EVENTS, help="in this order (default: all four, ordered by the seed)"
    )
    for name, what in {
        "vllm": "the vllm executable (its CPU build will do)",
        "vllm-model": "the model directory for it",
        "gguf": "the model file for llama.cpp",
    }.items():
        variable = "XGEN_TEST_" + name.upper().replace("-", "_")
        parser.add_argument(
            f"--{name}", default=os.environ.get(variable), required=variable not in os.environ, help=what
        )
    parser.add_argument("--engine", choices=["llama-server", "llama-cpp-python"], default="llama-server")
    parser.add_argument("--logs", type=Path, help="keep the servers' and the proxy's logs in this directory")
    return parser.parse_args()


def main() -> int:
    options = parse()
    children.end_on_sigterm()
    events = options.events or random.Random(options.seed).sample(EVENTS, len(EVENTS))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = options.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        vllm, llama = start_all(options, folder, stack)
        storm = run(options.seed, options.requests, events, vllm, llama, folder, after=stack.close)
    print(storm.report())
    return 0 if storm.ok else 1


if __name__ == "__main__":
    sys.exit(main())
