from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.builders import backend
from xgen_proxy.config.settings import Routing
from xgen_proxy.fleet.circuit_breaker import SLOW_START_S
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.fleet.memory.pressure import LEVELS, Pressure
from xgen_proxy.fleet.snapshot import BackendSnapshot, FleetSnapshot, ReplicaSnapshot, from_json, to_json

STARTED = 100.0
REPLICA = ReplicaSnapshot("r", up=True, in_flight=0, slots=20, overcommit=4)


@pytest.mark.parametrize(
    ("after", "open_slots", "capacity"),
    [(0, 2, 2), (SLOW_START_S / 2, 10, 10), (SLOW_START_S, 20, 24), (999, 20, 24)],
)
def test_slow_start_opens_slots_one_by_one(after: float, open_slots: int, capacity: int) -> None:
    replica = replace(REPLICA, slow_start_at=STARTED)
    assert replica.open_slots(STARTED + after) == open_slots
    assert replica.capacity(STARTED + after) == capacity


def test_slow_start_leaves_at_least_one_slot() -> None:
    assert replace(REPLICA, slots=2, slow_start_at=STARTED).capacity(STARTED) == 1


def test_pressure_leaves_fewer_slots_and_a_closed_replica_counts_as_full() -> None:
    reduced = replace(REPLICA, pressure=Pressure("reduced", 6, ""), in_flight=3)
    assert (reduced.open_slots(0), reduced.capacity(0), reduced.load(0, Routing())) == (6, 6, 0.5)
    closed = replace(REPLICA, pressure=Pressure("closed", 6, ""))
    assert (closed.closed, closed.capacity(0), closed.load(0, Routing())) == (True, 6, 1.0)
    opening = replace(REPLICA, pressure=Pressure("normal", 30, ""))
    assert opening.capacity(0) == 24


@pytest.mark.parametrize("limit", [20, 22])
def test_no_request_goes_beyond_a_limit_over_the_slots(limit: int) -> None:
    assert replace(REPLICA, pressure=Pressure("reduced", limit, "")).capacity(0) == limit


def test_pressure_during_a_slow_start_leaves_the_fewer_slots() -> None:
    replica = replace(REPLICA, slow_start_at=STARTED, pressure=Pressure("reduced", 6, ""))
    assert [replica.open_slots(STARTED + after) for after in (0, SLOW_START_S / 2, SLOW_START_S)] == [2, 6, 6]


def test_capacity_is_slots_plus_overcommit() -> None:
    assert REPLICA.capacity(0) == 24
    assert replace(REPLICA, in_flight=23).has_capacity(0)
    assert not replace(REPLICA, in_flight=24).has_capacity(0)


def test_load_counts_open_slots_and_depends_on_now() -> None:
    scraped = Scrape(running=None, waiting=1.0, kv=None, at=100.0, stale_at=105.0)
    replica = replace(REPLICA, in_flight=5, slow_start_at=STARTED, scraped=scraped)
    assert replica.load(STARTED + SLOW_START_S / 2, Routing()) == 0.5
    assert replica.load(STARTED + SLOW_START_S, Routing()) == 1.0, "the scrape is stale"
    assert replica.load_parts(STARTED + SLOW_START_S, Routing()).stale
    assert replace(REPLICA, in_flight=5, scraped=scraped).load(104, Routing(waiting_full=2.0)) == 0.5


numbers = st.floats(0, 1e6)
scrapes = st.builds(
    Scrape,
    st.none() | numbers,
    st.none() | numbers,
    st.none() | numbers,
    at=numbers,
    stale_at=numbers,
    ours=st.integers(0, 99),
)
replicas = st.builds(
    ReplicaSnapshot,
    name=st.uuids().map(str),
    up=st.booleans(),
    in_flight=st.integers(0, 99),
    slots=st.integers(1, 99),
    overcommit=st.integers(0, 9),
    slow_start_at=st.none() | numbers,
    scraped=st.none() | scrapes,
    pressure=st.none() | st.builds(Pressure, st.sampled_from(LEVELS), st.none() | st.integers(1, 9), st.text()),
)
backends = st.builds(
    backend,
    name=st.text(max_size=5),
    device_class=st.sampled_from(["gpu", "cpu"]),
    replicas=st.lists(replicas, min_size=1, max_size=3).map(tuple),
    context=st.none() | st.integers(1, 9999),
)


@given(st.lists(backends, max_size=3))
def test_snapshots_survive_json(backends: list[BackendSnapshot]) -> None:
    fleet = FleetSnapshot(tuple(backends))
    assert from_json(json.loads(json.dumps(to_json(fleet), allow_nan=False))) == fleet
