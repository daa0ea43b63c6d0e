"""What the traffic of a running proxy costs: its /metrics, watched for a while.

The counters say how much was served while they were watched, and the slots in use how busy the replicas were. Watching
tells what traffic costs now; the proxy does not say how long it has run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import httpx
from prometheus_client.parser import text_string_to_metric_families

from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.fleets import per_million, per_thousand
from xgen_proxy.costs.prices import Machine, Prices
from xgen_proxy.costs.report import number, percent, table
from xgen_proxy.values import frozen

Labels = tuple[tuple[str, str], ...]
Page = dict[tuple[str, Labels], float]
SERVED = "2"  # the first digit of the status
SAMPLES = 30


@frozen
class Traffic:
    """Of one backend while it was watched. `busy`: the share of its slots in use, on average."""

    backend: str
    device_class: str
    replicas: int
    busy: float
    requests: float
    tokens_in: float
    tokens_out: float
    seconds: float


def fetch(url: str, key: str | None) -> Page:
    """The samples of /metrics. Raises CostError."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(url.rstrip("/") + "/metrics", headers=headers, timeout=10, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CostError(f"no proxy answers at {url} ({error}); start one with `xgen-proxy serve`") from None
    try:
        families = list(text_string_to_metric_families(response.text)) if response.status_code == 200 else []
    except ValueError:
        families = []
    page = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    if not any(name == "xgen_build_info" for name, _ in page):
        raise CostError(f"the server at {url} is not an xgen-proxy: {response.status_code} for /metrics")
    return page


def watch(url: str, key: str | None, seconds: float, progress: Callable[[int], None]) -> list[Traffic]:
    """Watch /metrics for that many seconds. `progress` gets the whole seconds that have passed. Raises CostError."""
    pages = [fetch(url, key)]
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        progress(int(passed))
        time.sleep(min(seconds / SAMPLES, seconds - passed))
        pages.append(fetch(url, key))
    return traffic(pages, time.monotonic() - began)


def traffic(pages: Sequence[Page], seconds: float) -> list[Traffic]:
    """Of each backend, in the order of their names."""
    found = []
    for labels in sorted(labels for name, labels in pages[-1] if name == "xgen_backend_device_class"):
        backend, device_class = dict(labels)["backend"], dict(labels)["device_class"]
        found.append(
            Traffic(
                backend=backend,
                device_class=device_class,
                replicas=len(values(pages[-1], "xgen_replica_up", backend=backend)),
                busy=statistics.mean(busy(page, backend) for page in pages),
                requests=risen(pages, "xgen_requests_total", backend=backend, status=SERVED),
                tokens_in=risen(pages, "xgen_tokens_total", backend=backend, type="input"),
                tokens_out=risen(pages, "xgen_tokens_total", backend=backend, type="output"),
                seconds=seconds,
            )
        )
    return found


def values(page: Page, name: str, **wanted: str) -> dict[Labels, float]:
    """The series with these labels; the status by its first digit."""
    return {
        labels: value
        for (each, labels), value in page.items()
        if each == name and all(dict(labels).get(label, "").startswith(text) for label, text in wanted.items())
        if "backend" not in wanted or dict(labels)["backend"] == wanted["backend"]
    }


def risen(pages: Sequence[Page], name: str, **wanted: str) -> float:
    """Series of replicas that are gone have been dropped, and count for nothing."""
    first, last = values(pages[0], name, **wanted), values(pages[-1], name, **wanted)
    return sum(max(0.0, value - first.get(labels, 0.0)) for labels, value in last.items())


def busy(page: Page, backend: str) -> float:
    slots = sum(values(page, "xgen_replica_slots", backend=backend).values())
    return min(1.0, sum(values(page, "xgen_replica_in_flight", backend=backend).values()) / slots) if slots else 0.0


def report(prices: Prices, found: Sequence[Traffic]) -> str:
    """Raises CostError if the prices lack a machine."""
    unit = prices.currency
    heads = (f"{unit} per hour", f"{unit} per 1,000 requests", f"{unit} per million output tokens")
    rows: list[tuple[str, ...]] = [("backend", "machines", "slots busy", "requests", *heads)]
    total = 0.0
    for each in found:
        machine = prices.machine(each.backend, each.device_class)
        per_hour = hourly(machine, each)
        total += per_hour
        name = f"{machines(machine, each)} {machine.name}"
        rows.append((each.backend, name, percent(each.busy), *cells(per_hour, [each])))
    rows.append(("all", "", "", *cells(total, found)))
    seconds = f"watched for {found[0].seconds:.0f} s" if found else "no backend"
    return f"{table(rows)}\n\n{seconds}; tokens of streams count only where the client asked for usage\n"


def cells(per_hour: float, found: Sequence[Traffic]) -> tuple[str, ...]:
    """The requests and what they cost, of these backends together."""
    requests, tokens = sum(each.requests for each in found), sum(each.tokens_out for each in found)
    seconds = max((each.seconds for each in found), default=1.0)
    costs = per_thousand(per_hour, requests / seconds), per_million(per_hour, tokens / seconds)
    return f"{requests:,.0f}", number(per_hour), *(number(cost) if math.isfinite(cost) else "-" for cost in costs)


def machines(machine: Machine, traffic: Traffic) -> int:
    return math.ceil(traffic.replicas / machine.replicas)


def hourly(machine: Machine, traffic: Traffic) -> float:
    """Of all machines of the backend, busy or not."""
    return machines(machine, traffic) * machine.per_hour(traffic.busy)
