"""What a fleet of machines costs at a load, and the loads at which one fleet is cheaper than another; no I/O.

    cost of 1,000 requests = price per hour / (requests per second x 3.6)

Machines come whole: a load needs as many as its requests/s divided by the goodput of one, rounded up. So cost rises in
steps, and a fleet may be cheaper at several separate ranges of load.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from xgen_proxy.values import frozen

SECONDS = 3600
MILLION = 1_000_000
MOST_STEPS = 50_000  # beyond so many steps the search for the next range ends: 0.1 s
TOLERANCE = 1e-9  # k machines at k times the goodput of one are k, whatever the division rounds to


def per_thousand(per_hour: float, requests_per_s: float) -> float:
    return per_hour / (requests_per_s * 3.6) if requests_per_s else math.inf


def per_million(per_hour: float, tokens_per_s: float) -> float:
    return per_hour / (tokens_per_s * SECONDS) * MILLION if tokens_per_s else math.inf


@frozen
class Fleet:
    """Machines of one kind. `fixed`: what one costs per hour because it is on. `extra`: what it costs more at full use.
    `goodput`: the requests/s that one serves within the objectives."""

    name: str
    fixed: float
    extra: float
    goodput: float

    def machines(self, load: float) -> int:
        return max(1, math.ceil(load / self.goodput - TOLERANCE))

    def per_hour(self, load: float) -> float:
        """Of as many machines as the load needs, at least one, all equally busy."""
        return self.machines(load) * self.fixed + self.extra * load / self.goodput

    def utilisation(self, load: float) -> float:
        return load / (self.machines(load) * self.goodput)

    @property
    def at_full(self) -> float:
        """Per hour and request/s at full use: the least that a request can cost."""
        return (self.fixed + self.extra) / self.goodput


@frozen
class Spill:
    """A fleet of `first` that is always full before `second` gets anything: what routing with a fallback does."""

    first: Fleet
    second: Fleet

    @property
    def name(self) -> str:
        return f"{self.first.name}, then {self.second.name}"

    def machines(self, load: float) -> tuple[int, int]:
        whole = max(1, math.floor(load / self.first.goodput + TOLERANCE))
        rest = load - whole * self.first.goodput
        return whole, self.second.machines(rest) if rest > TOLERANCE * load else 0

    def per_hour(self, load: float) -> float:
        whole, spilled = self.machines(load)
        held = min(load, whole * self.first.goodput)
        cost = whole * self.first.fixed + self.first.extra * held / self.first.goodput
        return cost + self.second.per_hour(load - held) if spilled else cost


@frozen
class Loads:
    """The loads above `over`, up to and with `to`, in requests/s."""

    over: float
    to: float


def cheaper(one: Fleet, other: Fleet) -> list[Loads]:
    """The loads at which `one` costs less than `other`, exactly; the last range may have no end."""
    found: list[Loads] = []
    end, always = horizon(one, other)
    for over, to in segments(one, other, end):
        if loads := cheaper_within(one, other, over, to):
            join(found, loads)
    if always:
        join(found, Loads(end, math.inf))
    return found


def join(found: list[Loads], loads: Loads) -> None:
    """Append the range, or lengthen the last one if it ends where this begins."""
    if found and math.isclose(found[-1].to, loads.over, rel_tol=TOLERANCE):
        found[-1] = Loads(found[-1].over, loads.to)
    else:
        found.append(loads)


def horizon(one: Fleet, other: Fleet) -> tuple[float, bool]:
    """The load beyond which nothing changes, and whether `one` is the cheaper there.

    A fleet costs at least load x at_full, and at most one idle machine more. So the fleet that is cheaper at full use
    is cheaper at every load where the difference is more than an idle machine of its own.
    """
    difference = other.at_full - one.at_full
    idle = one.fixed if difference > 0 else other.fixed
    step = max(one.goodput, other.goodput)
    most = MOST_STEPS * step / (1 + step / min(one.goodput, other.goodput))
    end = max(step, idle / abs(difference)) if difference else most
    return min(end, most), difference > 0 and end <= most


def segments(one: Fleet, other: Fleet, end: float) -> Iterator[tuple[float, float]]:
    """The ranges of load up to `end` in which neither fleet needs another machine."""
    steps = {count * fleet.goodput for fleet in (one, other) for count in range(1, math.ceil(end / fleet.goodput))}
    bounds = [0.0, *sorted(steps), end]
    return ((over, to) for over, to in itertools.pairwise(bounds) if to - over > TOLERANCE * to)


def cheaper_within(one: Fleet, other: Fleet, over: float, to: float) -> Loads | None:
    """In a segment both costs are straight lines, so that they cross once at most."""
    middle = (over + to) / 2
    constant = one.machines(middle) * one.fixed - other.machines(middle) * other.fixed
    slope = one.extra / one.goodput - other.extra / other.goodput
    first, last = constant + slope * over, constant + slope * to
    if first >= 0 and last >= 0:
        return None
    if first <= 0 and last <= 0:
        return Loads(over, to)
    crossing = -constant / slope
    return Loads(crossing, to) if last < 0 else Loads(over, crossing)
