from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.config.memory_guard import MemoryGuard
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.fleet.memory.pressure import DWELL_S, GROWTH_S, SLOWLY_S, MemoryPressure, Pressure, Room, Signal
from xgen_proxy.fleet.snapshot import ReplicaSnapshot

GIB = 1024**3
GUARD = MemoryGuard(kv_reduce=0.9, kv_close=0.97)
SLOTS = 16


class Story:
    """Scrapes of one replica, a second apart."""

    def __init__(self) -> None:
        self.memory = MemoryPressure()
        self.now = 100.0
        self.levels: list[str] = []

    def scrape(
        self,
        *kvs: float | None,
        preemptions: float | None = 0.0,
        running: float = 8,
        in_flight: int | None = None,
        **more: Any,
    ) -> Pressure | None:
        for kv in kvs:
            self.now += 1
            if in_flight is None and self.memory.pressure and self.memory.pressure.limit:
                running = min(running, self.memory.pressure.limit)  # it has settled
            ours = int(running + more.get("waiting", 0)) if in_flight is None else in_flight
            scraped = Scrape(running, more.get("waiting", 0.0), kv, self.now, self.now + 5, ours, preemptions)
            self.memory.observe_scrape(scraped, ours, SLOTS, GUARD, self.now)
            pressure = self.memory.pressure
            self.levels.append(pressure.level if pressure else "normal")
        return self.memory.pressure

    def ram(self, *left: float, size: float = 16, held: int = 4) -> Pressure | None:
        for each in left:
            self.now += 1
            room = Room(int(each * GIB), int(size * GIB), "its cgroup")
            settled = min(held, self.memory.pressure.limit or held) if self.memory.pressure else held
            self.memory.observe_ram(room, settled, SLOTS, GUARD, self.now)
        return self.memory.pressure


def test_a_wave_that_fills_the_cache_for_a_moment_changes_nothing() -> None:
    assert Story().scrape(0.5, 0.99, 0.99, 0.5, 0.99, 0.99) is None


def test_three_full_scrapes_in_a_row_reduce_and_three_more_close() -> None:
    story = Story()
    story.scrape(0.98, 0.98, 0.98)
    assert story.memory.pressure == Pressure("reduced", 7, "memory: KV cache 98% used")
    story.scrape(0.98, 0.98, 0.98)
    assert story.levels == ["normal", "normal", "reduced", "reduced", "reduced", "closed"]


def test_full_but_not_fuller_stays_reduced() -> None:
    story = Story()
    story.scrape(*[0.92] * 30)
    assert set(story.levels[2:]) == {"reduced"}


def test_the_first_preemption_reduces_at_once() -> None:
    story = Story()
    story.scrape(0.6, preemptions=7)
    pressure = story.scrape(0.6, preemptions=9, running=6, waiting=2.0)
    assert pressure == Pressure("reduced", 5, "memory: KV cache 60% used, 2 requests preempted")


def test_preemptions_that_go_on_close() -> None:
    story = Story()
    for count in range(5):
        story.scrape(0.85, preemptions=count)
    assert story.levels == ["normal", "reduced", "reduced", "reduced", "closed"]
    assert story.memory.pressure
    assert story.memory.pressure.reason == "memory: KV cache 85% used, 4 requests preempted"


def test_preemptions_of_a_closed_replica_lower_it_further() -> None:
    story = Story()
    limits = []
    for count in range(12):
        pressure = story.scrape(0.85, preemptions=count, running=20)
        limits.append(pressure.limit if pressure else None)
    assert limits == [None, 18, 18, 18, 16, 16, 16, 14, 14, 14, 12, 12]


def test_a_full_cache_without_preemptions_is_not_lowered_further() -> None:
    story = Story()
    pressure = story.scrape(*[0.99] * 60, running=20)
    assert pressure
    assert (pressure.level, pressure.limit) == ("closed", 16)


def test_a_counter_that_began_again_is_no_preemption() -> None:
    story = Story()
    story.scrape(0.1, preemptions=50)
    assert story.scrape(0.1, preemptions=0) is None


def test_it_gets_better_step_by_step_and_only_well_below_the_threshold() -> None:
    story = Story()
    story.scrape(*[0.99] * 6)
    closed_at = story.now
    story.scrape(*[0.88] * 20)
    assert story.levels[-1] == "closed", "0.88 is not well below 0.97"
    story.scrape(0.86, 0.86, 0.86)
    assert story.levels[-1] == "reduced"
    reduced_at = story.now
    story.scrape(*[0.1] * 4)
    assert story.levels[-1] == "reduced"
    assert story.now < reduced_at + DWELL_S < closed_at + 60
    story.scrape(0.1)
    assert story.memory.pressure == Pressure("normal", 6, "memory: enough again, opening step by step, 6 requests now")


def test_it_opens_step_by_step_and_waits_while_the_cache_fills() -> None:
    story = Story()
    story.scrape(0.95, 0.95, 0.95)
    story.scrape(*[0.1] * 5)
    limits = []
    for _ in range(2 * int(GROWTH_S)):
        pressure = story.scrape(0.1)
        limits.append(pressure.limit if pressure else None)
    assert limits == [7, 7, 8, 8, 8, 9]
    story.scrape(*[0.85] * 20)
    assert story.memory.pressure
    assert story.memory.pressure.limit == 9
    story.scrape(*[0.1] * 60)
    assert story.memory.pressure is None, "all slots are open"


@pytest.mark.parametrize("kv", [0.86, None])
def test_without_preemptions_it_opens_slowly_though_the_cache_is_not_well_below_its_threshold(kv: float | None) -> None:
    """None: the engine does not report its cache, or not any more."""
    story = Story()
    story.scrape(0.86, preemptions=0)
    story.scrape(kv, preemptions=1)
    story.scrape(*[kv] * int(SLOWLY_S - 1), preemptions=1)
    assert story.levels[-1] == "reduced"
    story.scrape(kv, preemptions=1)
    assert story.memory.pressure == Pressure("normal", 7, "memory: enough again, opening step by step, 7 requests now")
    story.scrape(*[kv] * int(SLOWLY_S - 1), preemptions=1)
    assert story.memory.pressure.limit == 7
    story.scrape(*[kv] * int(SLOWLY_S * 9), preemptions=1)
    assert story.memory.pressure is None


def test_ram_that_is_nearly_short_does_not_keep_the_limit_of_the_cache() -> None:
    story = Story()
    story.scrape(0.5, preemptions=0)
    story.scrape(0.5, preemptions=1)
    assert story.memory.pressure
    for _ in range(60):
        story.scrape(0.1, preemptions=1)
        story.ram(0.15 * 16)
    assert story.memory.pressure is None


def test_preemptions_of_an_engine_that_does_not_report_its_cache() -> None:
    story = Story()
    story.scrape(None, preemptions=0)
    assert story.scrape(None, preemptions=1) == Pressure(
        "reduced", 7, "memory: KV cache use unknown, 1 requests preempted"
    )


@pytest.mark.parametrize(("held", "limit"), [(1, 2), (2, 2), (3, 2), (4, 3)])
def test_ram_that_runs_short_leaves_an_eighth_of_the_requests(held: int, limit: int) -> None:
    story = Story()
    pressure = story.ram(1.5, 1.5, 1.5, held=held)
    assert pressure
    assert pressure.limit == limit
    story.ram(*[0.5] * 20, held=held)
    assert story.memory.pressure
    assert story.memory.pressure.limit == 2


@pytest.mark.parametrize(("left", "level"), [(0.02, "closed"), (0.08, "reduced")])
def test_a_replica_that_ran_short_while_idle_is_limited_once_it_has_requests(left: float, level: str) -> None:
    story = Story()
    idle = story.ram(*[left * 16] * 20, held=0)
    assert idle
    assert (idle.level, idle.limit) == (level, None)
    early = story.ram(left * 16, left * 16, held=8)
    assert early
    assert early.limit is None
    limited = story.ram(left * 16, held=8)
    assert limited
    assert (limited.level, limited.limit) == (level, 7)


def test_a_cache_that_another_proxy_filled_limits_our_requests_once_there_are_some() -> None:
    story = Story()
    idle = story.scrape(*[0.99] * 10, running=20, in_flight=0)
    assert idle
    assert (idle.level, idle.limit) == ("closed", None)
    limited = story.scrape(*[0.99] * 3, running=20, in_flight=8)
    assert limited
    assert limited.limit == 7


def test_while_requests_drain_it_is_neither_closed_nor_held_to_less() -> None:
    story = Story()
    story.scrape(0.98, 0.98, 0.98)
    story.scrape(*[0.98] * 20, in_flight=8)
    assert story.memory.pressure
    assert (story.memory.pressure.level, story.memory.pressure.limit) == ("reduced", 7)
    story.scrape(0.98, 0.98, 0.98, in_flight=7, running=7)
    assert story.memory.pressure
    assert (story.memory.pressure.level, story.memory.pressure.limit) == ("closed", 6)


def test_other_proxies_requests_are_not_counted_as_ours() -> None:
    story = Story()
    pressure = story.scrape(0.95, 0.95, 0.95, running=12, in_flight=4)
    assert pressure
    assert pressure.limit == 3


@pytest.mark.parametrize("scrape", [None, Scrape(1.0, 0.0, None, 0.0, 9.0)])
def test_unknown_is_not_full(scrape: Scrape | None) -> None:
    story = Story()
    story.scrape(*[0.99] * 6)
    story.memory.observe_scrape(scrape, 1, SLOTS, GUARD, story.now + 1)
    assert story.memory.level == 0
    assert story.memory.pressure
    assert story.memory.pressure.level == "normal"


def test_ram_reduces_and_closes() -> None:
    story = Story()
    assert story.ram(2.0, 1.5, 1.5) is None
    assert story.ram(1.5) == Pressure("reduced", 3, "memory: 1.5 of 16.0 GiB of its cgroup left")
    pressure = story.ram(0.5, 0.5, 0.5)
    assert pressure
    assert pressure.level == "closed"
    story.memory.observe_ram(None, 4, SLOTS, GUARD, story.now)
    assert story.memory.level == 0, "unknown has no effect"


def test_both_reasons_are_told() -> None:
    story = Story()
    story.scrape(0.95, 0.95, 0.95)
    pressure = story.ram(1.0, 1.0, 1.0)
    assert pressure
    assert pressure.reason == "memory: KV cache 95% used, 1.0 of 16.0 GiB of its cgroup left"


@pytest.mark.parametrize(
    ("left", "size", "share"), [(1, 10, 0.9), (2, 512, 0.9), (100, 512, 0), (0, 1, 1), (20, 20, 0)]
)
def test_of_a_large_machine_the_last_20_gib_count(left: int, size: int, share: float) -> None:
    assert Room(left * GIB, size * GIB, "this machine").share == pytest.approx(share)


@pytest.mark.parametrize(
    ("level", "limit", "slots"), [("closed", 5, 5), ("closed", 99, 16), ("reduced", 5, 5), ("normal", 99, 16)]
)
def test_open_slots(level: Any, limit: int, slots: int) -> None:
    assert Pressure(level, limit, "").open_slots(SLOTS) == slots
    assert Pressure("normal", None, "").open_slots(SLOTS) == SLOTS


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60))
def test_levels_change_one_at_a_time_and_never_get_better_at_once(readings: list[tuple[float, bool]]) -> None:
    signal, changed_at = Signal(), -1000
    for now, (share, lost) in enumerate(readings):
        before = signal.level
        signal.observe(share, (0.9, 0.97), now, lost=lost)
        assert abs(signal.level - before) <= 1
        assert signal.level >= before or now - changed_at >= DWELL_S
        if signal.level != before:
            changed_at = now


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2), st.integers(0, 40)), max_size=60))
def test_some_request_is_always_let_in(readings: list[tuple[float, int, int]]) -> None:
    story, preemptions = Story(), 0
    for kv, lost, running in readings:
        preemptions += lost
        pressure = story.scrape(kv, preemptions=preemptions, running=running)
        assert pressure is None or pressure.open_slots(SLOTS) >= 1


def test_preemptions_lower_it_to_one_request_where_not_even_two_fit() -> None:
    story = Story()
    for count in range(20):
        story.scrape(0.85, preemptions=count, running=3)
    assert story.memory.pressure
    assert story.memory.pressure.limit == 1


@given(st.integers(1, 1000), st.integers(0, 16))
def test_while_requests_are_preempted_a_full_replica_holds_fewer_and_fewer(slots: int, overcommit: int) -> None:
    """vLLM has memory for all of them: its --max-num-seqs is over slots and overcommit."""
    memory, held = MemoryPressure(), []
    for now in range(100):
        replica = ReplicaSnapshot("r", True, 0, slots, overcommit, pressure=memory.pressure)
        held.append(replica.capacity(now))
        scrape = Scrape(held[-1], 0.0, 0.9, now, now + 5, held[-1], preemptions=now)
        memory.observe_scrape(scrape, held[-1], slots + overcommit, GUARD, now)
    assert all(later <= earlier for earlier, later in itertools.pairwise(held))
    assert held[-1] <= max(1, held[0] / 10)
