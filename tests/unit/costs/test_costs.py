"""The cost of runs, at utilisations, and the break-even of two machines with what repeats leave open."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.unit.costs.builders import machine, repeat, run, subject, two
from xgen_proxy.costs.costs import Range, break_evens, range_of, subjects
from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.measurements import Run


def figures(found: Range | None) -> tuple[float, float, float]:
    assert found is not None
    return found.low, found.middle, found.high


def test_a_range() -> None:
    assert range_of([3.0, 1.0, 2.0]) == Range(1.0, 2.0, 3.0)


def test_what_a_run_cost() -> None:
    """3.6 an hour at 1 request/s is 1 per 1,000 requests; at 100 tokens each 10 per million."""
    only = subject(run(1.0))
    cost = only.cost_of(only.best)
    assert cost.utilisation == 1.0
    assert cost.requests == Range(1.0, 1.0, 1.0)
    assert figures(cost.output_tokens) == pytest.approx((10, 10, 10))
    assert figures(cost.all_tokens) == pytest.approx((10 / 3, 10 / 3, 10 / 3))


def test_a_run_that_used_the_machine_less_cost_more_for_a_request() -> None:
    only = subject(run(1.0, rate=1.0), run(4.0, rate=8.0))
    low, high = (only.cost_of(each) for each in only.runs)
    assert (low.utilisation, high.utilisation) == (0.25, 1.0)
    assert (low.requests.middle, high.requests.middle) == (1.0, 0.25)


def test_an_overloaded_machine_is_used_fully_by_requests_that_count_for_nothing() -> None:
    """Power is paid for late answers, too."""
    powered = machine(fixed=1.8, extra=1.8)
    only = subject(run(4.0, rate=4.0), run(repeat(2.0, throughput=5.0), rate=8.0), on=powered)
    cost = only.cost_of(only.runs[1])
    assert only.best is only.runs[0]
    assert cost.utilisation == 1.0
    assert cost.requests.middle == pytest.approx(3.6 / (2.0 * 3.6))


def test_repeats_give_a_range() -> None:
    only = subject(run(1.0, 2.0, 4.0))
    assert only.cost_of(only.best).requests == Range(0.25, 0.5, 1.0)
    assert only.goodput == Range(1.0, 2.0, 4.0)


def test_a_repeat_in_which_all_was_late() -> None:
    """Its price has no end; the best run is another one, if there is one that always had goodput."""
    only = subject(run(2.0, repeat(0.0, throughput=5.0, tokens_out=None), 2.0, rate=2.0), run(1.0, rate=1.0))
    low, high = (only.cost_of(each) for each in only.runs)
    assert only.best is only.runs[0]
    assert figures(low.requests) == (1.0, 1.0, 1.0)
    assert figures(high.requests) == (0.5, 0.5, math.inf)
    assert figures(high.output_tokens) == pytest.approx((5.0, 5.0, math.inf))


def test_the_cost_at_a_utilisation() -> None:
    only = subject(run(4.0), on=machine(fixed=1.8, extra=1.8))
    half = only.cost_at(0.5)
    assert half.goodput.middle == 2.0
    assert half.requests.middle == pytest.approx((1.8 + 0.9) / (2.0 * 3.6))


def test_unknown_tokens_have_no_price() -> None:
    only = subject(run(repeat(1.0, tokens_in=None)))
    cost = only.cost_of(only.best)
    assert cost.output_tokens is not None
    assert cost.all_tokens is None


def test_a_machine_may_have_several_subjects() -> None:
    found = subjects([run(2.0), run(3.0, subject="transformers"), run(1.0, rate=1.0)], machine)
    assert [(each.title, len(each.runs)) for each in found] == [("gpu (vllm)", 2), ("gpu (transformers)", 1)]
    assert [each.load for each in found[0].runs] == ["1/s", ""]


def test_the_best_of_arriving_requests_counts_before_that_of_a_closed_loop() -> None:
    """One at a time a machine has no queue. The closed runs have a cost of their own all the same."""
    mixed = subject(run(1.2, concurrency=1), run(0.2, rate=0.5), run(0.3, rate=0.9))
    assert (mixed.best.load, mixed.goodput.middle, len(mixed.runs)) == ("0.9/s", 0.3, 3)
    assert mixed.cost_at(1.0).goodput.middle == 0.3
    closed = subject(run(1.2, concurrency=1), run(0.4, concurrency=4))
    assert closed.goodput.middle == 1.2


def test_arriving_requests_that_were_all_late_are_not_made_up_for_by_a_closed_loop() -> None:
    with pytest.raises(CostError, match="gpu served requests within the objectives in a closed loop only; measure"):
        subject(run(1.2, concurrency=1), run(0.0, rate=0.9))
    with pytest.raises(CostError, match=r"gpu had no load at which each repeat served some requests within the object"):
        subject(run(1.2, concurrency=1), run(0.0, 0.5, rate=0.9))


def test_no_goodput_at_all() -> None:
    with pytest.raises(CostError, match="gpu served no request within the objectives; measure at a lower load"):
        subject(run(0.0))


def test_the_break_even_of_two_machines() -> None:
    [even] = break_evens(two())
    assert (even.one.machine.name, even.other.machine.name) == ("gpu", "cpu")
    assert figures(even.first) == pytest.approx((12, 12, 12))


def test_repeats_leave_the_break_even_open() -> None:
    [even] = break_evens(two(cpu=(0.9, 1.0, 1.1)))
    assert figures(even.first) == pytest.approx((10.8, 12.0, 13.2))


def test_repeats_may_leave_open_whether_there_is_one() -> None:
    """At 11 requests/s a GPU costs more than the CPUs at any load; at 13 it does not."""
    [even] = break_evens(two(gpu=(11.0, 13.0, 14.0)))
    assert figures(even.first)[1:] == pytest.approx((12.0, math.inf))


def test_no_break_even() -> None:
    [even] = break_evens(two(gpu=(5.0,)))
    assert (even.cheaper, even.first) == ((), None)


def test_each_machine_is_compared_with_the_last_by_its_best_subject() -> None:
    runs = [run(2.0), run(9.0, subject="fast"), run(5.0, machine="l4"), run(1.0, machine="cpu", subject="llama")]
    evens = break_evens(subjects(runs, machine))
    assert [(even.one.title, even.other.title) for even in evens] == [
        ("gpu (fast)", "cpu (llama)"),
        ("l4 (vllm)", "cpu (llama)"),
    ]
    assert break_evens(subjects(runs[:2], machine)) == []


def test_a_subject_with_arriving_requests_is_better_than_one_with_a_closed_loop() -> None:
    runs = [run(9.0, concurrency=8), run(2.0, subject="slow", rate=4.0), run(0.5, machine="cpu", rate=1.0)]
    [even] = break_evens(subjects(runs, machine))
    assert even.one.title == "gpu (slow)"


def at(place: str, machine: str, goodput: float, closed: bool = False) -> Run:
    load: dict[str, Any] = {"concurrency": 1} if closed else {"rate": 99.0}
    return run(goodput, machine=machine, subject=place, where=place, **load)


@pytest.mark.parametrize(
    ("runs", "where", "names"),
    [
        (
            [at("direct", "gpu", 9.0), at("proxy", "gpu", 8.0), at("direct", "cpu", 2.0), at("proxy", "cpu", 1.0)],
            "proxy",
            ("proxy", "proxy"),
        ),
        ([at("direct", "gpu", 8.0), at("proxy", "gpu", 9.0), at("direct", "cpu", 1.0)], "direct", ("direct", "direct")),
        ([at("proxy", "gpu", 9.0), at("direct", "cpu", 1.0)], None, ("proxy", "direct")),
        (
            [
                at("direct", "gpu", 9.0),
                at("proxy", "gpu", 8.0),
                at("direct", "cpu", 1.0),
                at("proxy", "cpu", 2.0, closed=True),
            ],
            "direct",
            ("direct", "direct"),
        ),
        (
            [at("direct", "gpu", 9.0), at("proxy", "gpu", 8.0), at("proxy", "cpu", 2.0, closed=True)],
            "proxy",
            ("proxy", "proxy"),
        ),
        ([run(9.0), at("proxy", "cpu", 1.0)], None, ("vllm", "proxy")),
    ],
    ids=["both", "only direct", "apart", "arriving requests go first", "one in a closed loop", "unknown"],
)
def test_machines_are_compared_where_all_were_measured(
    runs: list[Run], where: str | None, names: tuple[str, str]
) -> None:
    [even] = break_evens(subjects(runs, machine))
    assert (even.where, (even.one.name, even.other.name)) == (where, names)


def test_one_place_for_all_machines() -> None:
    """The last machine, with which all are compared, is the same one each time."""
    runs = [at("proxy", "gpu", 9.0), at("direct", "gpu", 9.0), at("direct", "l4", 5.0)]
    evens = break_evens(subjects([*runs, at("proxy", "cpu", 2.0), at("direct", "cpu", 1.0)], machine))
    assert [(even.one.name, even.other.name) for even in evens] == [("direct", "direct")] * 2
