"""A replica's load: the gauges on its /metrics page, combined with our own count of requests. Does no I/O."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from xgen_proxy.config.settings import Routing
from xgen_proxy.values import frozen

# Gauge → field of Scrape. vLLM renamed its KV gauge: https://github.com/vllm-project/vllm/issues/18354
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv",
    "vllm:gpu_cache_usage_perc": "kv",
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
    "vllm:num_preemptions_total": "preemptions",
}
Gauges = dict[str, float | None]
MAX_ENGINES = 1024  # samples of one gauge; vLLM has one for each engine of a server
MAX_SAMPLE_BYTES = 4096  # of a line: its labels and value
STILL = 3  # scrapes; while a wave of prompts enters the batch, the number in it changes from one to the next
KV_FULL = 0.9
MOST_SLOTS = 65_536


@frozen
class Scrape:
    """The gauges of one /metrics page. None: the page does not have the gauge; unknown is never 0.

    `running`, `waiting`: requests, summed over all engines of the server. `kv`: share of the KV cache in use, 0 to 1.
    `preemptions`: running requests that lost their KV cache so far. `at`: when it was read, and `stale_at`: when it
    expires, in seconds of time.monotonic(). `ours`: our own requests on the replica at that time.
    """

    running: float | None
    waiting: float | None
    kv: float | None
    at: float
    stale_at: float
    ours: int = 0
    preemptions: float | None = None


def parse_metrics(page: bytes) -> Gauges:
    """Sum `running`, `waiting` and `preemptions` over a server's engines, and average `kv`, since it is a ratio.

    Whatever else the page is, a gauge that is missing, malformed or no number from 0 up is None. Searches for seven
    names only: a page of vLLM has 70 KB, and parsing all of it takes 50 times as long.
    """
    found: dict[str, list[float]] = {"running": [], "waiting": [], "kv": [], "preemptions": []}
    for name, field in GAUGES.items():
        found[field] += _samples(page, name.encode())
    values = {field: samples if all(map(_is_count, samples)) else [] for field, samples in found.items()}
    sums = {field: sum(samples) if samples else None for field, samples in values.items()}
    kv = sums["kv"]
    return {**sums, "kv": None if kv is None else kv / len(values["kv"])}


def _samples(page: bytes, name: bytes) -> list[float]:
    """NaN for a sample that is malformed. At most MAX_ENGINES of them."""
    samples: list[float] = []
    at = page.find(name)
    for _ in range(2 * MAX_ENGINES):  # the name stands in two comments as well
        if at < 0:
            break
        after = at + len(name)
        if page[max(0, at - 1) : at] in (b"", b"\n") and page[after : after + 1] in (b"{", b" "):
            end = page.find(b"\n", after, after + MAX_SAMPLE_BYTES)
            line = page[after : end if end >= 0 else after + MAX_SAMPLE_BYTES]
            value = line.rpartition(b"}")[2].split()[:1]  # a timestamp may follow
            try:
                samples.append(float(value[0]) if value else math.nan)
            except ValueError:
                samples.append(math.nan)
        at = page.find(name, after)
    return samples[:MAX_ENGINES]


def _is_count(value: float) -> bool:
    return 0 <= value < math.inf


class LearntSlots:
    """The slots of an engine that does not report them, learnt from its gauges: vLLM's --max-num-seqs.

    While requests wait and their number in the batch stands still, over STILL scrapes, the batch is full. It is not
    taken for full while the KV cache is: then memory is what they wait for. Requests are still sent beyond the slots
    (`Dialect.overcommit`), so a number that was too small is corrected as soon as more are seen running.
    """

    def __init__(self) -> None:
        self.slots: int | None = None
        self._running = 0.0
        self._still = 0  # scrapes in a row that showed the same number running and some waiting

    def observe(self, scrape: Scrape) -> bool:
        """Returns whether `slots` changed."""
        running, before = scrape.running or 0.0, self.slots
        full = running >= 1 and (scrape.waiting or 0) >= 1 and (scrape.kv or 0) < KV_FULL
        self._still = (self._still + 1 if running == self._running else 1) if full else 0
        self._running = running
        if self._still >= STILL or (self.slots is not None and running > self.slots):
            self.slots = min(int(running), MOST_SLOTS)
        return self.slots != before


@frozen
class LoadParts:
    """`total`: the worst of the ratios; 0 is idle, 1 full, more is overfull. `age_s`: of the scrape, if any."""

    total: float
    in_flight: float
    slots: int
    waiting: float | None
    kv: float | None
    age_s: float | None
    stale: bool

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def load_of(*, in_flight: int, slots: int, scraped: Scrape | None, now: float, routing: Routing) -> LoadParts:
    """Rule 5: the worst of in-flight/slots, waiting/5 and KV usage/0.8.

    In-flight is our own current count plus the scraped running + waiting requests that were not ours at the time of the
    scrape. So the count of a single proxy is exact, and one of several proxies misses only what the others did since
    (bench/herding.py). A missing gauge is ignored. A stale scrape means saturated, and its gauges are ignored.
    https://gateway-api-inference-extension.sigs.k8s.io
    """
    if scraped is None:
        return LoadParts(in_flight / slots, in_flight, slots, None, None, None, False)
    age = now - scraped.at
    busy = float(in_flight)
    if now > scraped.stale_at:
        return LoadParts(max(busy / slots, 1.0), busy, slots, scraped.waiting, scraped.kv, age, True)
    if scraped.running is not None:
        busy += max(0, scraped.running + (scraped.waiting or 0) - scraped.ours)
    waiting = (scraped.waiting or 0) / routing.waiting_full
    kv = (scraped.kv or 0) / routing.kv_full
    return LoadParts(max(busy / slots, waiting, kv), busy, slots, scraped.waiting, scraped.kv, age, False)
