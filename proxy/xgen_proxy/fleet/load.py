"""A replica's load: the gauges on its /metrics page, combined with our own count of requests. Does no I/O."""

from __future__ import annotations

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
}
Gauges = dict[str, float | None]


@frozen
class Scrape:
    """The gauges of one /metrics page. None: the page does not have the gauge; unknown is never 0.

    `running`, `waiting`: requests, summed over all engines of the server. `kv`: share of the KV cache in use, 0 to 1.
    `at`: when it was read, and `stale_at`: when it expires, in seconds of time.monotonic(). `ours`: our own requests
    on the replica at that time.
    """

    running: float | None
    waiting: float | None
    kv: float | None
    at: float
    stale_at: float
    ours: int = 0


def parse_metrics(page: str) -> Gauges:
    """Sum `running` and `waiting` over a server's engines, and average `kv`, since it is a ratio.

    Scans for six names only: a page of vLLM has 70 KB, and parsing all of it takes 50 times as long. Raises ValueError
    or IndexError for a malformed page.
    """
    found: dict[str, list[float]] = {"running": [], "waiting": [], "kv": []}
    for line in page.splitlines():
        if line.startswith(("vllm:", "llamacpp:")):
            name, _, _ = line.partition("{") if "{" in line else line.partition(" ")
            field = GAUGES.get(name)
            if field:
                value = line.removeprefix(name).rpartition("}")[2].split()[0]  # a timestamp may follow
                found[field].append(float(value))
    kv = found["kv"]
    return {
        "running": sum(found["running"]) if found["running"] else None,
        "waiting": sum(found["waiting"]) if found["waiting"] else None,
        "kv": sum(kv) / len(kv) if kv else None,
    }


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
