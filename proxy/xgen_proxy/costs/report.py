"""The costs as a text for people and as JSON for programs; no I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from xgen_proxy.costs.costs import UTILISATIONS, BreakEven, Cost, Range, Subject
from xgen_proxy.costs.fleets import Loads
from xgen_proxy.costs.measurements import PLACES
from xgen_proxy.costs.prices import Machine, Prices

DAY = 86_400
Row = tuple[str, ...]


def text(prices: Prices, subjects: Sequence[Subject], evens: Sequence[BreakEven], doubts: Sequence[str]) -> str:
    unit = prices.currency
    parts = [
        table(machine_rows(prices, [each.machine for each in subjects])),
        table(run_rows(unit, subjects)),
        table(utilisation_rows(unit, subjects)),
        "\n".join(sentence for even in evens for sentence in sentences(even)),
        "\n".join(f"note: {doubt}" for doubt in doubts),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def machine_rows(prices: Prices, machines: Sequence[Machine]) -> list[Row]:
    rows: list[Row] = [("machine", f"{prices.currency} per hour", "what", "price from")]
    for each in dict.fromkeys(machines):
        busy = f" idle, {number(each.per_hour(1.0))} at full use" if each.extra else ""
        origin = ", ".join(filter(None, (each.source, each.date)))
        rows.append((each.name, f"{number(each.fixed)}{busy}", each.what, origin))
    return rows


def run_rows(unit: str, subjects: Sequence[Subject]) -> list[Row]:
    """Each run that was measured, at the utilisation that it reached."""
    rows: list[Row] = [("machine", "subject", "load", "goodput/s", "utilisation", *cost_heads(unit))]
    for subject in subjects:
        for run in subject.runs:
            cost = subject.cost_of(run)
            rows.append(
                (*names(subject), run.load or "-", spread(cost.goodput), percent(cost.utilisation), *cost_cells(cost))
            )
    return rows


def utilisation_rows(unit: str, subjects: Sequence[Subject]) -> list[Row]:
    rows: list[Row] = [("machine", "subject", "utilisation", "requests/s", *cost_heads(unit))]
    for subject in subjects:
        for share in UTILISATIONS:
            cost = subject.cost_at(share)
            rows.append((*names(subject), percent(share), spread(cost.goodput), *cost_cells(cost)))
    return rows


def names(subject: Subject) -> Row:
    return subject.machine.name, subject.name or "-"


def cost_heads(unit: str) -> Row:
    return f"{unit} per 1,000 requests", f"{unit} per million output tokens", f"{unit} per million tokens"


def cost_cells(cost: Cost) -> Row:
    return tuple(spread(each) for each in (cost.requests, cost.output_tokens, cost.all_tokens))


def sentences(even: BreakEven) -> list[str]:
    """At which loads each of the two is cheaper, and where they were measured."""
    alike = even.one.name == even.other.name
    one, other = (each.machine.name if alike else each.title for each in (even.one, even.other))
    if even.first is None or not even.cheaper:
        return [f"No break-even: {other} costs less than {one} at every load.", *places(even)]
    if even.cheaper == (Loads(0.0, math.inf),):
        return [f"No break-even: {one} costs less than {other} at every load.", *places(even)]
    ranges = " and ".join(words(loads) for loads in even.cheaper)
    told = [f"Break-even: {one} costs less than {other} {ranges}; else {other} does.", *places(even)]
    load = even.cheaper[0].over
    if load:
        above = load * (1 + 1e-6)
        fleet, against = (each.fleet(each.goodput.middle) for each in (even.one, even.other))
        a_day, used, needed = f"{load * DAY:,.0f}", percent(fleet.utilisation(load)), machines(against.machines(above))
        first, second = even.one.machine.name, even.other.machine.name
        told += [
            f"At {spread(even.first)} requests/s, {a_day} a day, {one} is used to {used} and {other} needs {needed}.",
            f"What a full {first} cannot serve is cheaper on {second} up to that much more.",
        ]
    return told


def places(even: BreakEven) -> list[str]:
    return [f"Both were measured {PLACES[even.where]}."] if even.where else []


def words(loads: Loads) -> str:
    if math.isinf(loads.to):
        return f"above {number(loads.over)} requests/s"
    if not loads.over:
        return f"up to {number(loads.to)} requests/s"
    return f"from {number(loads.over)} to {number(loads.to)} requests/s"


def machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count:,} machines"


def percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.1 or not share else f"{share * 100:.1f} %"


def spread(figures: Range | None) -> str:
    """The median, and the range where repeats differ."""
    if figures is None:
        return "?"
    middle, low, high = (number(each) for each in (figures.middle, figures.low, figures.high))
    return middle if low == high else f"{middle} ({low}–{high})"


def number(value: float) -> str:
    """With three significant digits, and no exponent."""
    if not value or not math.isfinite(value):
        return "∞" if math.isinf(value) else "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


# For programs


def data(
    prices: Prices, subjects: Sequence[Subject], evens: Sequence[BreakEven], doubts: Sequence[str]
) -> dict[str, Any]:
    """What is infinite is null there: the end of loads without one, the price of requests that were all late."""
    found = {
        "currency": prices.currency,
        "machines": [asdict(machine) for machine in dict.fromkeys(each.machine for each in subjects)],
        "subjects": [subject_data(subject) for subject in subjects],
        "break_even": [even_data(even) for even in evens],
        "notes": list(doubts),
    }
    return {name: finite(value) for name, value in found.items()}


def subject_data(subject: Subject) -> dict[str, Any]:
    runs = [
        {"load": run.load, "rate": run.rate, "concurrency": run.concurrency, **asdict(subject.cost_of(run))}
        for run in subject.runs
    ]
    at = [asdict(subject.cost_at(share)) for share in UTILISATIONS]
    return {"machine": subject.machine.name, "subject": subject.name, "runs": runs, "at_utilisation": at}


def even_data(even: BreakEven) -> dict[str, Any]:
    return {
        "machine": even.one.machine.name,
        "subject": even.one.name,
        "where": even.where,
        "against": {"machine": even.other.machine.name, "subject": even.other.name},
        "cheaper": [asdict(loads) for loads in even.cheaper],
        "requests_per_s": even.first and asdict(even.first),
    }


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
