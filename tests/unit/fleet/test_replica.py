from __future__ import annotations

import pytest

from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.fleet.load import Scrape

URLS = [f"http://127.0.0.1:{port}" for port in (1, 2)]


def backend(**values: object) -> Backend:
    settings = {"urls": URLS, "dialect": "vllm", "slots": 20, **values}
    [made] = Fleet(Settings(backends={"vllm": settings})).backends
    return made


def test_drained_is_set_when_the_last_request_ends() -> None:
    made = backend()
    replica = made.replicas[1]
    replica.acquire()
    made.reconcile([])
    assert not replica.drained.is_set()
    replica.release()
    assert replica.drained.is_set()


@pytest.mark.parametrize(("joined_later", "state", "slow"), [
    (False, "starting", False), (False, "down", True), (False, "suspect", True), (True, "starting", True),
])  # fmt: skip
def test_slow_start_of_replicas_that_come_back_or_joined_later(joined_later: bool, state: str, slow: bool) -> None:
    made = backend()
    made.reconcile([*URLS, "http://127.0.0.1:3"], joined_later=joined_later)
    replica = made.replicas[2]
    replica.set_state(state, "test")  # type: ignore[arg-type]
    replica.mark_up("test")
    assert (replica.open_slots < replica.slots) is slow


def test_live_replica_and_its_snapshot_agree() -> None:
    made = backend()
    replica = made.replicas[0]
    replica.acquire()
    assert (replica.capacity, replica.open_slots, replica.has_capacity) == (36, 20, True)
    assert replica.load == replica.snapshot().load(0, made.routing) == 1 / 20


def test_slots_come_from_settings_then_replica_then_dialect() -> None:
    replica = backend(slots=None).replicas[0]
    assert replica.slots == replica.dialect.slots == 256
    replica.record_info(ReplicaInfo(("m",), slots=7))
    assert replica.slots == 7
    configured = backend(slots=20).replicas[0]
    configured.record_info(ReplicaInfo(("m",), slots=7))
    assert configured.slots == 20


def test_learnt_slots_yield_to_what_the_settings_or_the_replica_say() -> None:
    full = Scrape(16.0, 5.0, 0.1, at=0.0, stale_at=9.0)
    learning, configured, reporting = backend(slots=None), backend(slots=20), backend(slots=None)
    reporting.record_info(reporting.replicas[0], ReplicaInfo(("m",), slots=7))
    for made in (learning, configured, reporting):
        for _ in range(3):
            made.replicas[0].record_scrape(full)
    assert [made.replicas[0].slots for made in (learning, configured, reporting)] == [16, 20, 7]
    assert learning.snapshot().replicas[0].slots == 16
    learning.replicas[0].set_state("down", "restarted")
    learning.replicas[0].record_info(ReplicaInfo(("m",)))
    assert learning.replicas[0].slots == 256


def test_replica_that_goes_down_does_not_answer() -> None:
    made = backend()
    replica = made.replicas[0]
    replica.record_answer()
    assert made.snapshot().replicas[0].answers
    replica.set_state("suspect", "test")
    assert replica.answers
    replica.set_state("down", "test")
    replica.record_answer()  # of a check that was under way
    assert not made.snapshot().replicas[0].answers


def test_failures_make_a_replica_suspect() -> None:
    replica = backend().replicas[0]
    replica.mark_up("test")
    for _ in range(3):
        replica.failed("says 500")
    assert (replica.state, replica.breaker.state) == ("suspect", "open")
    assert replica.reason == "3 requests failed in a row, the last one: says 500"
