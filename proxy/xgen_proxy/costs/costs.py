"""What each run cost, what each subject costs at several utilisations, and which machine is cheaper when; no I/O.

Figures come with their range: a figure of several repeats is the median, and beside it the minimum and maximum.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.fleets import Fleet, Loads, cheaper, per_million, per_thousand
from xgen_proxy.costs.measurements import PLACES, Repeat, Run
from xgen_proxy.costs.prices import Machine
from xgen_proxy.values import frozen

UTILISATIONS = (0.25, 0.5, 0.75, 1.0)


@frozen
class Range:
    low: float
    middle: float
    high: float


def range_of(figures: Iterable[float]) -> Range:
    values = list(figures)
    return Range(min(values), statistics.median(values), max(values))


@frozen
class Cost:
    """At one load. `utilisation`: requests/s, in time or late, as a share of the best goodput. Prices are per 1,000
    requests and per million tokens; None where the number of tokens is unknown."""

    goodput: Range
    utilisation: float
    requests: Range
    output_tokens: Range | None
    all_tokens: Range | None


@frozen
class Subject:
    """An engine with a model on a machine. `best`: the run with the most goodput, of those that had some each time, and
    of those with arriving requests where there are any."""

    machine: Machine
    name: str
    runs: tuple[Run, ...]
    best: Run

    @property
    def title(self) -> str:
        return f"{self.machine.name} ({self.name})" if self.name else self.machine.name

    @property
    def goodput(self) -> Range:
        return goodput(self.best)

    @property
    def rank(self) -> tuple[bool, float]:
        """The highest is the best of a machine. What arriving requests were served counts before any closed loop,
        whose figure is higher for having no queue."""
        return self.best.is_open, self.goodput.middle

    def fleet(self, goodput: float) -> Fleet:
        return Fleet(self.machine.name, self.machine.fixed, self.machine.extra, goodput)

    def cost_of(self, run: Run) -> Cost:
        """What the run cost, a request that missed the objectives counting for nothing."""
        served = statistics.median(repeat.throughput for repeat in run.repeats)
        utilisation = min(1.0, served / self.goodput.middle)
        return self._cost(run.repeats, utilisation, 1.0)

    def cost_at(self, utilisation: float) -> Cost:
        """At this share of its best goodput, with requests like those of the best run."""
        return self._cost(self.best.repeats, utilisation, utilisation)

    def _cost(self, repeats: Sequence[Repeat], utilisation: float, share: float) -> Cost:
        per_hour = self.machine.per_hour(utilisation)

        def price(formula: Callable[[float, float], float], rates: Range) -> Range:
            return Range(*(formula(per_hour, rate) for rate in (rates.high, rates.middle, rates.low)))

        def tokens(count: Callable[[Repeat], float | None]) -> Range | None:
            good = [(repeat.goodput * share, count(repeat) if repeat.goodput else 0.0) for repeat in repeats]
            rates = [rate * tokens for rate, tokens in good if tokens is not None]
            return price(per_million, range_of(rates)) if len(rates) == len(good) else None

        served = range_of(repeat.goodput * share for repeat in repeats)
        return Cost(
            goodput=served,
            utilisation=utilisation,
            requests=price(per_thousand, served),
            output_tokens=tokens(lambda repeat: repeat.tokens_out),
            all_tokens=tokens(all_tokens),
        )


def all_tokens(repeat: Repeat) -> float | None:
    return None if repeat.tokens_in is None or repeat.tokens_out is None else repeat.tokens_in + repeat.tokens_out


def goodput(run: Run) -> Range:
    return range_of(repeat.goodput for repeat in run.repeats)


def subjects(runs: Iterable[Run], machine: Callable[[str], Machine]) -> list[Subject]:
    """In the order in which they were named, without those that served nothing in time. Raises CostError if that leaves
    a machine with none."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.machine, run.subject), []).append(run)
    made = []
    for (name, subject), group in found.items():
        best = max(comparable(group), key=lambda run: (goodput(run).low > 0, goodput(run).middle))
        if goodput(best).low:
            made.append(Subject(machine(name), subject, tuple(sorted(group, key=lambda run: run.height)), best))
    for name, _ in found:
        if name not in {each.machine.name for each in made}:
            own = [run for (each, _), group in found.items() if each == name for run in group]
            raise CostError(f"{name} {shortfall(own)}; measure at a lower load, or with wider objectives")
    return made


def comparable(runs: Sequence[Run]) -> list[Run]:
    """Those whose goodput can be compared with a load of arriving requests; all of them if none can."""
    return [run for run in runs if run.is_open] or list(runs)


def shortfall(runs: Sequence[Run]) -> str:
    """What the runs of a subject without a cost lack."""
    if not any(goodput(run).high for run in runs):
        return "served no request within the objectives"
    if any(goodput(run).high for run in comparable(runs)):
        return "had no load at which each repeat served some requests within the objectives"
    return "served requests within the objectives in a closed loop only"


@frozen
class BreakEven:
    """`cheaper`: the loads at which `one` costs less than `other`. `first`: where the first of them begins, with the
    range that the repeats leave open; None if there is none."""

    one: Subject
    other: Subject
    cheaper: tuple[Loads, ...]
    first: Range | None

    @property
    def where(self) -> str | None:
        """Where both were measured; None if in different places, or if that is unknown."""
        return self.one.best.where if self.one.best.where == self.other.best.where else None


def break_evens(found: Sequence[Subject]) -> list[BreakEven]:
    """Each machine against the one named last, each with its best subject of the place where all were measured."""
    machines: dict[str, list[Subject]] = {}
    for each in found:
        machines.setdefault(each.machine.name, []).append(each)
    where = common_place(list(machines.values()))
    *others, last = (
        max((each for each in group if where in (None, each.best.where)), key=lambda each: each.rank)
        for group in machines.values()
    )
    return [break_even(one, last) for one in others]


def common_place(machines: Sequence[Sequence[Subject]]) -> str | None:
    """Where each machine was measured: through the proxy if it can be, since that is what clients get, and before that
    with arriving requests. None if there is no such place."""
    for only_open, where in itertools.product((True, False), PLACES):
        there = [[each.best for each in group if each.best.where == where] for group in machines]
        if all(any(run.is_open or not only_open for run in runs) for runs in there):
            return where
    return None


def break_even(one: Subject, other: Subject) -> BreakEven:
    loads = cheaper(one.fleet(one.goodput.middle), other.fleet(other.goodput.middle))
    corners = itertools.product((one.goodput.low, one.goodput.high), (other.goodput.low, other.goodput.high))
    begins = [begin(cheaper(one.fleet(mine), other.fleet(its))) for mine, its in corners]
    middle = begin(loads)
    first = Range(min(*begins, middle), middle, max(*begins, middle)) if loads else None
    return BreakEven(one, other, tuple(loads), first)


def begin(loads: Sequence[Loads]) -> float:
    """Infinity where there are none."""
    return loads[0].over if loads else math.inf
