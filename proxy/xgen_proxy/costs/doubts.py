"""Reasons to doubt the figures: failed requests, closed loops, loads that were too low, and machines that were measured
in different places or with requests of different lengths."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from xgen_proxy.costs.costs import BreakEven, Subject, comparable, goodput, shortfall
from xgen_proxy.costs.measurements import PLACES, Run

UNLIKE = 0.1  # requests whose mean lengths differ by more
STILL_RISING = 0.05  # the goodput that the highest load adds
KEPT_UP = 0.95  # of the requests that came at a rate


def doubts(subjects: Sequence[Subject], evens: Sequence[BreakEven]) -> list[str]:
    """A sentence each."""
    checks = failures, closed_loop, too_low
    told = [f"{each.title}: {doubt}." for each in subjects for check in checks if (doubt := check(each))]
    return told + [
        doubt for each in evens for check in (apart, unlike) if (doubt := check(each.one, each.other)) is not None
    ]


def left_out(runs: Iterable[Run], subjects: Sequence[Subject]) -> list[str]:
    """A sentence for each subject that was measured and has no cost."""
    counted = {(each.machine.name, each.name) for each in subjects}
    rest: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if (run.machine, run.subject) not in counted:
            rest.setdefault((run.machine, run.subject), []).append(run)
    return [f"{machine} ({subject}) {shortfall(group)} and is left out." for (machine, subject), group in rest.items()]


def failures(subject: Subject) -> str | None:
    failed = sum(repeat.failed for repeat in subject.best.repeats)
    return f"{failed:,} requests failed in its best run" if failed else None


def closed_loop(subject: Subject) -> str | None:
    """How figures were measured that have no load, such as those typed by hand, is unknown."""
    if subject.best.is_open or subject.best.concurrency is None:
        return None
    return "measured in a closed loop; under arriving requests it serves less in time"


def too_low(subject: Subject) -> str | None:
    """Its best run is the one with the highest load, so that it might do more."""
    best = subject.best
    runs = comparable(subject.runs)
    if not best.load or best.height < max(run.height for run in runs):
        return None
    rest = [goodput(run).middle for run in runs if run is not best]
    if best.is_open:
        still_rising = subject.goodput.middle >= KEPT_UP * best.rate
    else:
        still_rising = not rest or subject.goodput.middle > max(rest) * (1 + STILL_RISING)
    return f"its highest load, {best.load}, was not too much for it; measure higher ones" if still_rising else None


def apart(one: Subject, other: Subject) -> str | None:
    here, there = one.best.where, other.best.where
    if here is None or there is None or here == there:
        return None
    return f"{one.title} was measured {PLACES[here]} and {other.title} {PLACES[there]}: no fair comparison."


def unlike(one: Subject, other: Subject) -> str | None:
    mine, its = lengths(one.best), lengths(other.best)
    if not any(differ(a, b) for a, b in zip(mine, its, strict=True)):
        return None
    shown = " against ".join(" and ".join(told) for told in (words(mine), words(its)))
    return f"{one.title} and {other.title} had unlike requests, {shown} tokens each: no fair comparison."


def lengths(run: Run) -> tuple[float | None, float | None]:
    """Tokens in and out of a mean request."""
    return mean([repeat.tokens_in for repeat in run.repeats]), mean([repeat.tokens_out for repeat in run.repeats])


def mean(figures: Sequence[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return statistics.mean(known) if known else None


def differ(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and abs(one - other) > UNLIKE * max(one, other)


def words(lengths: tuple[float | None, float | None]) -> list[str]:
    return [f"{length:.0f} {way}" for length, way in zip(lengths, ("in", "out"), strict=True) if length is not None]
