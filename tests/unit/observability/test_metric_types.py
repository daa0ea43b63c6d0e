"""Counters and histograms, and how they are rendered."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from xgen_proxy.observability.metric_types import Counter, Histogram


def samples(metric: Counter | Histogram) -> dict[tuple[str, ...], float]:
    """(name, *label values) → value."""
    return {(each.name, *each.labels.values()): each.value for each in metric.to_metric_family().samples}


def test_counter() -> None:
    counter = Counter("xgen_requests", "Requests.", ["backend", "status"])
    assert samples(counter) == {}
    counter.inc("vllm", "200")
    counter.inc("vllm", "200")
    counter.inc_by(40, "vllm", "500")
    assert samples(counter) == {
        ("xgen_requests_total", "vllm", "200"): 2,
        ("xgen_requests_total", "vllm", "500"): 40,
    }


def test_counter_without_labels_starts_at_0() -> None:
    counter = Counter("xgen_things", "Things.")
    assert samples(counter) == {("xgen_things_total",): 0}
    counter.inc()
    assert samples(counter) == {("xgen_things_total",): 1}


def test_initial_labels_start_at_0() -> None:
    counter = Counter("xgen_reloads", "Reloads.", ["result"], initial_labels=["taken", "refused"])
    counter.inc("taken")
    assert samples(counter) == {("xgen_reloads_total", "taken"): 1, ("xgen_reloads_total", "refused"): 0}


def test_forget_drops_the_series_with_a_label() -> None:
    counter = Counter("xgen_requests", "Requests.", ["replica", "status"])
    for labels in (("a", "200"), ("a", "500"), ("b", "a")):
        counter.inc(*labels)
    counter.forget("replica", "a")
    counter.forget("no such label", "b")
    assert samples(counter) == {("xgen_requests_total", "b", "a"): 1}


def test_histogram_without_labels_starts_at_0() -> None:
    found = samples(Histogram("xgen_seconds", "Seconds.", [1, 5]))
    assert set(found.values()) == {0}
    assert ("xgen_seconds_bucket", "+Inf") in found


class One(Collector):
    def __init__(self, metric: Histogram) -> None:
        self.metric = metric

    def collect(self) -> list[Metric]:
        return [self.metric.to_metric_family()]


@pytest.mark.parametrize("values", [[], [0.25], [0, 0.1, 0.1000001, 1, 3, 7.5, 100]])
def test_histogram_renders_like_prometheus_clients_own(values: list[float]) -> None:
    bounds = (0.1, 0.25, 1, 7.5)
    ours = Histogram("xgen_seconds", "Seconds.", bounds, ["backend"])
    registry = CollectorRegistry()
    theirs = PrometheusHistogram(
        "xgen_seconds", "Seconds.", ["backend"], registry=registry, buckets=(*bounds, math.inf)
    )
    for value in values:
        ours.observe(value, "vllm")
        theirs.labels("vllm").observe(value)
    our_registry = CollectorRegistry()
    our_registry.register(One(ours))

    def lines(page: bytes) -> list[str]:
        """Without the time of creation, which ours do not record."""
        return [line for line in page.decode().splitlines() if "_created" not in line]

    assert lines(generate_latest(our_registry)) == lines(generate_latest(registry))
