"""The gauges of a fleet that is not contacted. On a running proxy: tests/integration/observability/test_metrics.py."""

from __future__ import annotations

from typing import get_args

from xgen_proxy import __version__
from xgen_proxy.config.settings import Settings
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.fleet.circuit_breaker import State
from xgen_proxy.observability.fleet_metrics import FleetMetrics

BACKENDS = {
    "vllm": {"urls": "http://gpu-1:8000,http://gpu-2:8000", "slots": 7},
    "llama_cpp": {"urls": "http://cpu-1:8000"},
}


def samples(gauges: FleetMetrics, name: str) -> dict[tuple[str, ...], float]:
    """Label values → value."""
    [family] = [family for family in gauges.collect() if family.name == name]
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def gauges() -> FleetMetrics:
    return FleetMetrics(Fleet(Settings(backends=BACKENDS)), Admission(0, 0))


def test_one_sample_per_replica() -> None:
    assert samples(gauges(), "xgen_replica_slots") == {
        ("vllm", "vllm@gpu-1:8000"): 7,
        ("vllm", "vllm@gpu-2:8000"): 7,
        ("llama_cpp", "llama_cpp@cpu-1:8000"): 1,
    }
    for name in ("up", "in_flight"):
        assert set(samples(gauges(), f"xgen_replica_{name}").values()) == {0}


def test_state_is_read_on_each_scrape() -> None:
    made = gauges()
    replica = next(iter(made.fleet.replicas))
    labels = (replica.backend_name, replica.name)
    assert samples(made, "xgen_replica_up")[labels] == 0
    replica.set_state("up", "")
    assert samples(made, "xgen_replica_up")[labels] == 1


def test_replica_without_a_scrape_has_no_scrape_age() -> None:
    assert samples(gauges(), "xgen_replica_scrape_age_seconds") == {}


def test_pressure_of_memory_is_shown_only_while_the_guard_is_on() -> None:
    made = gauges()
    assert samples(made, "xgen_replica_memory_pressure") == {}
    made.fleet.settings.memory_guard.enabled = True
    assert set(samples(made, "xgen_replica_memory_pressure").values()) == {0}


def test_breaker_has_one_sample_per_state() -> None:
    states = samples(gauges(), "xgen_replica_breaker_state")
    assert len(states) == 3 * len(get_args(State))
    assert {labels[2]: value for labels, value in states.items() if labels[0] == "llama_cpp"} == {
        state: state == "closed" for state in get_args(State)
    }


def test_gauges_of_the_proxy() -> None:
    made = gauges()
    assert samples(made, "xgen_queue_requests") == {(): 0}
    assert samples(made, "xgen_backend_device_class") == {("vllm", "gpu"): 1, ("llama_cpp", "cpu"): 1}
    assert samples(made, "xgen_build_info") == {(__version__,): 1}
