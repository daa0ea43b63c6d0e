"""Counters and histograms that cost a dictionary lookup where prometheus_client's take a lock and join strings: they
are counted on the hot path, by the one thread that serves, and told in its format when scraped.

https://prometheus.io/docs/concepts/metric_types/
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Counter:
    """`name` without `_total`. `labels`: their names; what is given to add() are their values, in this order. `known`:
    values of its one label that are told as 0 from the start, so that the first event is a change."""

    def __init__(self, name: str, help: str, labels: Sequence[str] = (), initial_labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self.values: dict[Labels, float] = {(each,): 0.0 for each in initial_labels} if labels else {(): 0.0}

    def inc(self, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + 1.0

    def inc_by(self, count: float, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + count

    def forget(self, label: str, value: str) -> None:
        """Drops the rows in which `label` has this value."""
        if label in self.labels:
            at = self.labels.index(label)
            self.values = {labels: count for labels, count in self.values.items() if labels[at] != value}

    def to_metric_family(self) -> Metric:
        family = CounterMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class Histogram:
    """A histogram of seconds. `bounds`: the upper ones of its buckets, in order."""

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self.bounds = tuple(bounds)
        self.rows: dict[Labels, list[float]] = {} if labels else {(): self._row()}

    def _row(self) -> list[float]:
        """How many fell into each bucket, the one without bound last; then the sum of all."""
        return [0.0] * (len(self.bounds) + 2)

    def observe(self, seconds: float, *labels: str) -> None:
        row = self.rows.get(labels)
        if row is None:
            row = self.rows[labels] = self._row()
        row[bisect_left(self.bounds, seconds)] += 1.0
        row[-1] += seconds

    def to_metric_family(self) -> Metric:
        family = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        names = [*map(floatToGoString, self.bounds), "+Inf"]
        for labels, row in self.rows.items():
            so_far, buckets = 0.0, []
            for name, count in zip(names, row, strict=False):
                so_far += count
                buckets.append((name, so_far))
            family.add_metric(labels, buckets, row[-1])
        return family
