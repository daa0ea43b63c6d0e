"""Simulate whether several proxies, which know each other's load only from scrapes, send requests to the same replica.

    python -m bench.herding --proxies 8 --replicas 64 --utilisation 0.8

The simulation has its own clock around the real decide(), Fleet, Replica and load formula. Requests arrive at random
(Poisson), each at one of the proxies; a replica runs --slots at once and queues the rest, as vLLM does. It compares
several proxies, one proxy, and one that knows every engine's current state, by our rule and by two random choices. The
result is the time that requests wait in a replica's queue. Each repeat has a seed, and gives all arrangements the same
arrivals and work.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from xgen_proxy.config.settings import Settings
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.request.features import Features
from xgen_proxy.routing.policy import decide

SERVICE_S = 2.0  # mean, exponential
SCRAPE_S = 1.0
WARM_UP = 0.2  # share of the requests that do not count
CHAT = Features(
    endpoint="chat", model="m", prompt_words=20, prompt_tokens=30, max_tokens=200, stream=True, include_usage=False,
    needs=frozenset(), backend=None, urgency="normal", task_type=None, fallback=True, continuation=True, hinted=False,
    session=None, prefix="",
)  # fmt: skip


class Engine:
    """A server that runs `slots` requests at once and queues the rest."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running = 0
        self.waiting: deque[Callable[[], None]] = deque()

    def submit(self, begin: Callable[[], None]) -> None:
        if self.running < self.slots:
            self.running += 1
            begin()
        else:
            self.waiting.append(begin)

    def done(self) -> None:
        if self.waiting:
            self.waiting.popleft()()
        else:
            self.running -= 1


@dataclass
class Simulation:
    """An arrangement. `sees_all`: each proxy knows the current state of every engine. `two_choices`: the less loaded
    of two random replicas, instead of our rule."""

    proxies: int
    engines: list[Engine]
    sessions: bool
    sees_all: bool
    two_choices: bool
    seed: int
    now: float = 0.0
    waits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.choices = random.Random(self.seed + 1)  # its own, so that all arrangements get the same work
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.ticket = itertools.count()
        urls = [f"http://10.0.{number // 250}.{number % 250 + 1}:8000" for number in range(len(self.engines))]
        backend = {"urls": urls, "slots": self.engines[0].slots, "models": {"m": "m"}}
        self.settings = Settings(backends={"vllm": backend})
        self.engine_of = dict(zip(urls, self.engines, strict=True))
        self.fleets = [Fleet(self.settings) for _ in range(self.proxies)]
        for each in itertools.chain.from_iterable(mine.replicas for mine in self.fleets):
            each.set_state("up", "simulated")
            if not self.sees_all:
                self.at(self.random.uniform(0, SCRAPE_S), partial(self.scrape_again, each))

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.ticket), what))

    def scrape(self, replica: Replica) -> None:
        engine = self.engine_of[replica.url]
        stale_at = self.now + self.settings.stale_after_s
        replica.record_scrape(
            Scrape(engine.running, len(engine.waiting), None, at=self.now, stale_at=stale_at, ours=replica.in_flight)
        )

    def scrape_again(self, replica: Replica) -> None:
        self.scrape(replica)
        self.at(self.now + SCRAPE_S * self.choices.uniform(0.9, 1.1), partial(self.scrape_again, replica))

    def choose(self, mine: Fleet, number: int) -> Replica:
        if self.sees_all:
            for replica in mine.replicas:
                self.scrape(replica)
        if self.two_choices:
            two = self.choices.sample(mine.backends[0].replicas, 2)
            return min(two, key=lambda replica: replica.snapshot().load(self.now, self.settings.routing))
        features = replace(CHAT, session=str(number)) if self.sessions else CHAT
        plan = decide(features, mine.snapshot(), self.settings.routing, self.choices, self.now)
        candidates = [candidate.replica for candidate in plan.candidates]
        chosen = next((replica for replica in candidates if replica.has_capacity(self.now)), candidates[0])
        return mine.backends[0].replicas_by_name[chosen.name]

    def arrive(self, work: float, number: int) -> None:
        replica = self.choose(self.fleets[number % self.proxies], number)
        replica.acquire()
        arrived, engine = self.now, self.engine_of[replica.url]

        def begin() -> None:
            self.waits.append(self.now - arrived)
            self.at(self.now + work, end)

        def end() -> None:
            replica.release()
            engine.done()

        engine.submit(begin)

    def run(self, requests: int, utilisation: float) -> list[float]:
        """The waits after the warm-up, in seconds."""
        rate = utilisation * sum(engine.slots for engine in self.engines) / SERVICE_S
        when = 0.0
        for number in self.random.sample(range(requests), requests):
            when += self.random.expovariate(rate)
            work = self.random.expovariate(1 / SERVICE_S)
            self.at(when, partial(self.arrive, work, number))
        last = when
        while self.events and self.events[0][0] <= last:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return self.waits[int(len(self.waits) * WARM_UP) :]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--proxies", type=int, default=8, help="(%(default)s)")
    flags.add_argument("--replicas", type=int, default=64, help="(%(default)s)")
    flags.add_argument("--slots", type=int, default=16, help="per replica (%(default)s)")
    flags.add_argument("--utilisation", type=float, nargs="+", default=[0.7, 0.8, 0.9], help="(%(default)s)")
    flags.add_argument("--requests", type=int, default=60_000, help="per repeat (%(default)s)")
    flags.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    flags.add_argument("--sessions", action="store_true", help="give each request its own session")
    options = flags.parse_args()
    print("utilisation  proxies  sees                     waits at all  wait p99 (spread)        of one that sees all")
    for utilisation in options.utilisation:
        base: list[float] = []
        for proxies, sees_all, two in (
            (1, True, True),
            (1, True, False),
            (1, False, False),
            (options.proxies, False, False),
        ):
            tails, shares = [], []
            for seed in range(options.repeats):
                engines = [Engine(options.slots) for _ in range(options.replicas)]
                waits = Simulation(proxies, engines, options.sessions, sees_all, two, seed).run(
                    options.requests, utilisation
                )
                tails.append(percentile(waits, 0.99) * 1000)
                shares.append(sum(wait > 0 for wait in waits) / len(waits) * 100)
            base = base or tails
            ratio = statistics.median(tails) / statistics.median(base) if statistics.median(base) else float("nan")
            spread = f"{statistics.median(tails):6.0f} ms ({min(tails):.0f}-{max(tails):.0f})"
            what = ("everything, two choices" if two else "everything") if sees_all else "scrapes"
            share = f"{statistics.median(shares):10.2f} %"
            print(f"{utilisation:11.2f}  {proxies:7}  {what:23}  {share}  {spread:23}  {ratio:5.2f}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
