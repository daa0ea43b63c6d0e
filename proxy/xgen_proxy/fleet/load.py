"""A replica's load: what its /metrics page says, joined with what we sent it ourselves. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from xgen_proxy.config.settings import Routing

# Each name with what it means here. vLLM renamed its KV gauge: https://github.com/vllm-project/vllm/issues/18354
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv",
    "vllm:gpu_cache_usage_perc": "kv",
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
}
Gauges = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Load:
    """Read off a metrics page at `at` (seconds, time.monotonic()). None: the page does not tell; never 0 for unknown.

    `running`, `waiting`: requests, over all engines of the server. `kv`: share of the KV cache in use, 0 to 1. `ours`:
    requests that we had there ourselves.
    """

    running: float | None
    waiting: float | None
    kv: float | None
    at: float
    ours: int = 0


def parse_metrics(page: str) -> Gauges:
    """running and waiting are summed over a server's engines, the KV share is averaged: shares do not add up.

    A scan for six names, since a page of vLLM's has 70 KB and a full parse of it takes 50 times as long.
    """
    found: dict[str, list[float]] = {"running": [], "waiting": [], "kv": []}
    for line in page.splitlines():
        if line.startswith(("vllm:", "llamacpp:")):
            name, _, _ = line.partition("{") if "{" in line else line.partition(" ")
            meaning = GAUGES.get(name)
            if meaning:
                value = line.removeprefix(name).rpartition("}")[2].split()[0]  # a timestamp may follow
                found[meaning].append(float(value))
    kv = found["kv"]
    return {
        "running": sum(found["running"]) if found["running"] else None,
        "waiting": sum(found["waiting"]) if found["waiting"] else None,
        "kv": sum(kv) / len(kv) if kv else None,
    }


@dataclass(slots=True)
class LoadParts:
    """`total` is the worst of the ratios: 0 idle, 1 full, more when overfull. `age_s`: of the scrape, if any."""

    total: float
    in_flight: float
    slots: int
    waiting: float | None
    kv: float | None
    age_s: float | None
    stale: bool

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def load_of(
    *,
    in_flight: int,
    slots: int,
    scraped: Load | None,
    now: float,
    stale_after_s: float,
    routing: Routing,
) -> LoadParts:
    """Rule 5: the worst of in-flight/slots, waiting/5 and KV usage/0.8.

    In-flight is our own count now and, of the scraped running + waiting, what was not ours then: a proxy that is alone
    has an exact count, one of several is wrong only by what others did since (bench/herding.py). A gauge that is not
    there decides nothing. A scrape older than `stale_after_s` means saturated, and its gauges count no more.
    https://gateway-api-inference-extension.sigs.k8s.io
    """
    if scraped is None:
        return LoadParts(in_flight / slots, in_flight, slots, None, None, None, False)
    age = now - scraped.at
    busy = float(in_flight)
    if age > stale_after_s:
        return LoadParts(max(busy / slots, 1.0), busy, slots, scraped.waiting, scraped.kv, age, True)
    if scraped.running is not None:
        busy += max(0, scraped.running + (scraped.waiting or 0) - scraped.ours)
    waiting = (scraped.waiting or 0) / routing.waiting_full
    kv = (scraped.kv or 0) / routing.kv_full
    return LoadParts(max(busy / slots, waiting, kv), busy, slots, scraped.waiting, scraped.kv, age, False)
