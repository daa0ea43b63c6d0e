"""Reasons to doubt the figures: failed requests, loads that were too low, requests of different lengths."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from xgen_proxy.costs.costs import BreakEven, Subject, goodput
from xgen_proxy.costs.measurements import Run

UNLIKE = 0.1  # requests whose mean lengths differ by more
STILL_RISING = 0.05  # the goodput that the highest load adds
KEPT_UP = 0.95  # of the requests that came at a rate


def doubts(subjects: Sequence[Subject], evens: Sequence[BreakEven]) -> list[str]:
    """A sentence each."""
    told = [f"{each.title}: {doubt}." for each in subjects for doubt in (failures(each), too_low(each)) if doubt]
    return told + [doubt for each in evens if (doubt := unlike(each.one, each.other))]


def left_out(runs: Iterable[Run], subjects: Sequence[Subject]) -> list[str]:
    """A sentence for each subject that was measured and has no cost."""
    counted = {(each.machine.name, each.name) for each in subjects}
    rest = dict.fromkeys((run.machine, run.subject) for run in runs if (run.machine, run.subject) not in counted)
    return [
        f"{machine} ({subject}) served no request within the objectives and is left out." for machine, subject in rest
    ]


def failures(subject: Subject) -> str | None:
    failed = sum(repeat.failed for repeat in subject.best.repeats)
    return f"{failed:,} requests failed in its best run" if failed else None


def too_low(subject: Subject) -> str | None:
    """Its best run is the one with the highest load, so that it might do more."""
    best = subject.best
    comparable = [run for run in subject.runs if math.isinf(run.rate) == math.isinf(best.rate)]
    if not best.load or best.height < max(run.height for run in comparable):
        return None
    rest = [goodput(run).middle for run in comparable if run is not best]
    if math.isinf(best.rate):
        still_rising = not rest or subject.goodput.middle > max(rest) * (1 + STILL_RISING)
    else:
        still_rising = subject.goodput.middle >= KEPT_UP * best.rate
    return f"its highest load, {best.load}, was not too much for it; measure higher ones" if still_rising else None


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
