"""The cost of whole machines, and the loads at which one kind is cheaper."""

from __future__ import annotations

import math

import pytest

from xgen_proxy.costs.fleets import Fleet, Loads, Spill, cheaper, per_million, per_thousand

GPU = Fleet("gpu", fixed=2.5, extra=0.0, goodput=40.0)
CPU = Fleet("cpu", fixed=0.2, extra=0.0, goodput=1.0)
POWERED = Fleet("own", fixed=0.1, extra=0.2, goodput=1.0)


def test_the_formula() -> None:
    assert per_thousand(3.6, 1.0) == 1.0
    assert per_thousand(2.5, 40) == pytest.approx(2.5 / (40 * 3.6))
    assert per_million(3.6, 1000.0) == pytest.approx(1.0)
    assert per_thousand(1.0, 0.0) == per_million(1.0, 0.0) == math.inf


@pytest.mark.parametrize(("load", "count"), [(0.1, 1), (1.0, 1), (1.001, 2), (7.0, 7), (7.5, 8)])
def test_machines_come_whole(load: float, count: int) -> None:
    assert CPU.machines(load) == count
    assert CPU.per_hour(load) == pytest.approx(count * 0.2)
    assert CPU.utilisation(load) == pytest.approx(load / count)


def test_rounding_buys_no_machine() -> None:
    """0.1 * 3 / 0.1 is more than 3 in floating point."""
    fleet = Fleet("cpu", fixed=1.0, extra=0.0, goodput=0.1)
    assert [fleet.machines(0.1 * count) for count in range(1, 100)] == list(range(1, 100))


def test_power_rises_with_use() -> None:
    assert POWERED.per_hour(0.5) == pytest.approx(0.1 + 0.1)
    assert POWERED.per_hour(1.5) == pytest.approx(2 * 0.1 + 1.5 * 0.2)
    assert POWERED.at_full == pytest.approx(0.3)


def test_break_even_on_a_step() -> None:
    """12 CPUs cost 2.4 and 13 cost 2.6: above 12 requests/s one GPU at 2.5 is cheaper."""
    [first, *_] = cheaper(GPU, CPU)
    assert first.over == pytest.approx(12.0)
    [_, *rest] = cheaper(GPU, CPU)
    assert rest == []
    assert first.to == math.inf


def test_break_even_on_a_slope() -> None:
    """Four of the own machines cost 0.4 + 0.2 x load, which is 1.05 at 3.25 requests/s."""
    [loads] = cheaper(Fleet("gpu", fixed=1.05, extra=0.0, goodput=40.0), POWERED)
    assert loads.over == pytest.approx(3.25)
    assert loads.to == math.inf


def test_several_ranges() -> None:
    """A second and a third GPU cost more than the CPUs that they replace, for a while; a fourth does not."""
    ranges = cheaper(Fleet("gpu", fixed=3.0, extra=0.0, goodput=20.0), CPU)
    assert [(round(loads.over, 6), round(loads.to, 6)) for loads in ranges] == [(15, 20), (30, 40), (45, math.inf)]


def test_never_and_always() -> None:
    assert cheaper(Fleet("gpu", fixed=100.0, extra=0.0, goodput=40.0), CPU) == []
    assert cheaper(Fleet("gpu", fixed=0.1, extra=0.0, goodput=40.0), CPU) == [Loads(0.0, math.inf)]
    assert cheaper(CPU, CPU) == []


def test_cheaper_only_below() -> None:
    """The other side. From 14 to 15 requests/s both cost 3.0, so that neither is cheaper."""
    ranges = cheaper(CPU, Fleet("gpu", fixed=3.0, extra=0.0, goodput=20.0))
    assert [(round(loads.over, 6), round(loads.to, 6)) for loads in ranges] == [(0, 14), (20, 29), (40, 44)]


@pytest.mark.parametrize("one", [GPU, CPU, POWERED, Fleet("x", fixed=1.7, extra=0.9, goodput=7.3)])
@pytest.mark.parametrize("other", [CPU, POWERED, Fleet("y", fixed=0.31, extra=0.07, goodput=1.9)])
def test_every_load_is_in_the_range_that_its_costs_say(one: Fleet, other: Fleet) -> None:
    ranges = cheaper(one, other)
    for step in range(1, 2000):
        load = step * 0.0613
        difference = one.per_hour(load) - other.per_hour(load)
        if abs(difference) > 1e-6:
            assert any(loads.over < load <= loads.to for loads in ranges) == (difference < 0), load


def test_fleets_that_cost_almost_the_same_end_the_search() -> None:
    close = Fleet("close", fixed=0.2 * (1 + 1e-12), extra=0.0, goodput=1.0)
    assert cheaper(close, CPU) == []


def test_the_rest_spills() -> None:
    spill = Spill(GPU, CPU)
    assert spill.machines(10.0) == (1, 0)
    assert spill.machines(40.0) == (1, 0)
    assert spill.machines(42.5) == (1, 3)
    assert spill.machines(80.0) == (2, 0)
    assert spill.per_hour(42.5) == pytest.approx(2.5 + 0.6)
    assert spill.per_hour(10.0) == pytest.approx(2.5)
    assert spill.name == "gpu, then cpu"
