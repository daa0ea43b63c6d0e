"""Metrics of the fleet, computed on scrape, so that they always match it and disappear with a removed replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xgen_proxy import __version__
from xgen_proxy.config.fallback import Pair
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.circuit_breaker import State
from xgen_proxy.fleet.replica import Replica

REPLICA = ("backend", "replica")
BREAKER_STATES: tuple[str, ...] = get_args(State)


class FleetMetrics(Collector):
    """prometheus_client calls collect() for each scrape. `settings_current`: the last reload was not refused."""

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.fleet = fleet
        self.admission = admission
        self.settings_current = True
        self.model_pairs: Callable[[], Mapping[Pair, bool | None]] = dict

    def collect(self) -> Iterator[Metric]:
        replicas = list(self.fleet.replicas)
        yield _of_each(replicas, "up", "1: the replica accepts requests.", lambda replica: replica.up)
        yield _of_each(replicas, "load", "0 idle, 1 full; see routing rule 5.", lambda replica: replica.load)
        yield _of_each(replicas, "in_flight", "Requests that hold one of its slots.", lambda replica: replica.in_flight)
        yield _of_each(replicas, "slots", "Requests it runs at once.", lambda replica: replica.slots)
        yield _of_each(replicas, "scrape_age_seconds", "Since its load was last read, if its engine reports one.", _age)
        yield _of_each(
            replicas if self.fleet.settings.memory_guard.enabled else [],
            "memory_pressure",
            "0: none; 1: short of memory, it takes less work; 2: it takes no new work while another can do it. Absent:"
            " the memory guard is off.",
            lambda replica: replica.memory.level,
        )
        yield _breakers(replicas)
        yield _preempted(replicas)
        yield _resent(replicas)
        queued = GaugeMetricFamily("xgen_queue_requests", "Requests that wait for a slot.", labels=())
        queued.add_metric((), len(self.admission.queue))
        device_classes = GaugeMetricFamily(
            "xgen_backend_device_class",
            "1: the backend is on this class of device, gpu or cpu.",
            labels=("backend", "device_class"),
        )
        for backend in self.fleet.backends:
            device_classes.add_metric((backend.name, backend.device_class), 1)
        current = GaugeMetricFamily(
            "xgen_config_current",
            "0: the last reload was refused, so that older settings run than their files say; the log has the reason.",
            labels=(),
        )
        current.add_metric((), self.settings_current)
        build = GaugeMetricFamily("xgen_build_info", "1: the version that runs.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield from (queued, device_classes, current, build)
        yield self._mismatches()
        yield self._distances()

    def _mismatches(self) -> Metric:
        family = GaugeMetricFamily(
            "xgen_model_mismatch",
            "1: two backends serve the same model name, but split a text into different tokens. Absent: not known.",
            labels=("backend", "to", "model"),
        )
        for pair, alike in self.model_pairs().items():
            if alike is not None:
                family.add_metric(pair, not alike)
        return family

    def _distances(self) -> Metric:
        family = GaugeMetricFamily(
            "xgen_model_top1",
            "Share of positions at which two backends prefer the same next token, as fallback.distances says.",
            labels=("backend", "to", "model"),
        )
        for pair, top1 in self.fleet.settings.fallback.top1.items():
            family.add_metric(pair, top1)
        return family


def _of_each(
    replicas: list[Replica], name: str, help: str, value: Callable[[Replica], float | None]
) -> GaugeMetricFamily:
    """One sample per replica, without those for which `value` returns None."""
    family = GaugeMetricFamily(f"xgen_replica_{name}", help, labels=REPLICA)
    for replica in replicas:
        sample = value(replica)
        if sample is not None:
            family.add_metric((replica.backend_name, replica.name), sample)
    return family


def _age(replica: Replica) -> float | None:
    return None if replica.scraped is None else time.monotonic() - replica.scraped.at


def _breakers(replicas: list[Replica]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "xgen_replica_breaker_state",
        "1 for the state its circuit breaker is in, 0 for the others.",
        labels=(*REPLICA, "state"),
    )
    for replica in replicas:
        for state in BREAKER_STATES:
            family.add_metric((replica.backend_name, replica.name, state), replica.breaker.state == state)
    return family


def _preempted(replicas: list[Replica]) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "xgen_preemptions",
        "Running requests that lost their KV cache and are computed again, as the engine counts them.",
        labels=REPLICA,
    )
    for replica in replicas:
        if replica.scraped is not None and replica.scraped.preemptions is not None:
            family.add_metric((replica.backend_name, replica.name), replica.scraped.preemptions)
    return family


def _resent(replicas: list[Replica]) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "xgen_resent_requests",
        "Requests sent twice, since the reused connection closed without a byte.",
        labels=REPLICA,
    )
    for replica in replicas:
        family.add_metric((replica.backend_name, replica.name), replica.pool.resent)
    return family
