"""Counters and histograms for the hot path, rendered in the Prometheus text format on scrape.

An update costs a dictionary lookup. prometheus_client's own types take a lock and join strings; one thread serves all
requests here, so neither is needed. https://prometheus.io/docs/concepts/metric_types/
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

LabelValues = tuple[str, ...]


class Counter:
    """A counter.

    `name` is without `_total`. `labels` are the labels' names; inc() takes their values in the same order.
    `initial_labels`: values of its only label that start at 0, so that the first event is an increase, which rate() can
    see, and not a new series.
    """

    def __init__(self, name: str, help: str, labels: Sequence[str] = (), initial_labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self.values: dict[LabelValues, float] = {(each,): 0.0 for each in initial_labels} if labels else {(): 0.0}

    def inc(self, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + 1.0

    def inc_by(self, count: float, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + count

    def forget(self, label: str, value: str) -> None:
        """Drop the series in which `label` has this value."""
        if label in self.labels:
            index = self.labels.index(label)
            self.values = {labels: count for labels, count in self.values.items() if labels[index] != value}

    def to_metric_family(self) -> Metric:
        family = CounterMetricFamily(self.name, self.help, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class Histogram:
    """A histogram of seconds. `bounds`: the upper bounds of its buckets in ascending order, without infinity."""

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self.bounds = tuple(bounds)
        self.rows: dict[LabelValues, list[float]] = {} if labels else {(): self._new_row()}

    def _new_row(self) -> list[float]:
        """The count of each bucket, the unbounded one last, and then the sum of all values."""
        return [0.0] * (len(self.bounds) + 2)

    def observe(self, seconds: float, *labels: str) -> None:
        row = self.rows.get(labels)
        if row is None:
            row = self.rows[labels] = self._new_row()
        row[bisect_left(self.bounds, seconds)] += 1.0
        row[-1] += seconds

    def to_metric_family(self) -> Metric:
        family = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        names = [*map(floatToGoString, self.bounds), "+Inf"]
        for labels, row in self.rows.items():
            cumulative, buckets = 0.0, []
            for name, count in zip(names, row, strict=False):
                cumulative += count
                buckets.append((name, cumulative))
            family.add_metric(labels, buckets, row[-1])
        return family
