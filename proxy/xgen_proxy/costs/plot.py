"""The plot: what each fleet costs per hour against the load, and where one becomes cheaper. Needs matplotlib.

The picture has its own white page, so that it reads alike on light and on dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xgen_proxy.costs.costs import BreakEven
from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.fleets import Fleet, Spill, per_thousand
from xgen_proxy.costs.report import number, spread
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.storage import result_file

# Text stays text, and the same figures give the same file: it can be committed and compared.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "xgen", "axes.grid": True, "grid.alpha": 0.3, "figure.figsize": (8, 6)}
# Told apart by colour-blind readers too: https://jfly.uni-koeln.de/color/
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHOWN_BEYOND = 10  # times the break-even, if that is at a low load
SHOWN_STEPS = 1.6  # times the goodput of the largest machine, else
MOST_STEPS = 400
POINTS = 400


def need_matplotlib() -> None:
    """Raises CostError before the work, not after it."""
    if find_spec("matplotlib") is None:
        raise CostError("a plot needs matplotlib: pip install '.[models]' in a checkout of xgen-proxy")


def draw(path: Path, currency: str, evens: Sequence[BreakEven]) -> None:
    """Raises CostError if the file cannot be written."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure, (hourly, each) = plt.subplots(2, 1, sharex=True)
        end = longest(evens)
        for color, fleet in zip(COLORS, fleets(evens), strict=False):
            loads = steps(fleet, end)
            costs = [fleet.per_hour(load) for load in loads]
            style = {"label": label(fleet), "color": color, "linestyle": "--" if isinstance(fleet, Spill) else "-"}
            hourly.plot(loads, costs, linewidth=1.6, **style)
            per_request = [per_thousand(cost, load) for cost, load in zip(costs, loads, strict=True)]
            each.plot(loads, per_request, linewidth=1.6, **style)
        for even in evens:
            mark(hourly, each, even)
        finish(hourly, each, currency, end)
        figure.suptitle(title(evens), fontsize=10)
        figure.tight_layout()
        try:
            with result_file(path) as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
        except ModelError as error:
            raise CostError(str(error)) from None
        finally:
            plt.close(figure)


def fleets(evens: Sequence[BreakEven]) -> list[Fleet | Spill]:
    """The one that all are compared with, each of the others, and the first of them with that one beside it."""
    last = fleet_of(evens[-1], other=True)
    others = [fleet_of(even) for even in evens]
    return [last, *others, Spill(others[0], last)]


def fleet_of(even: BreakEven, other: bool = False) -> Fleet:
    subject = even.other if other else even.one
    return subject.fleet(subject.goodput.middle)


def label(fleet: Fleet | Spill) -> str:
    if isinstance(fleet, Spill):
        return f"{fleet.first.name} always on, {fleet.second.name} for the rest"
    return f"{fleet.name} only, {number(fleet.goodput)}/s each"


def longest(evens: Sequence[BreakEven]) -> float:
    """Enough to see the second machine of the largest kind, unless the break-even would be lost at the left."""
    largest = max(fleet.goodput for even in evens for fleet in (fleet_of(even), fleet_of(even, other=True)))
    firsts = [even.first.middle for even in evens if even.first is not None and even.first.middle]
    last = max((first for first in firsts if math.isfinite(first)), default=largest)
    return last * SHOWN_BEYOND if last * SHOWN_BEYOND < largest else max(largest, last) * SHOWN_STEPS


def steps(fleet: Fleet | Spill, end: float) -> list[float]:
    """The loads to draw: evenly spread, and on both sides of each step."""
    loads = [end * index / POINTS for index in range(1, POINTS + 1)]
    for goodput in {fleet.goodput} if isinstance(fleet, Fleet) else {fleet.first.goodput}:
        loads += [edge for step in multiples(goodput, end) for edge in (step, math.nextafter(step, end) * (1 + 1e-6))]
    if isinstance(fleet, Spill):
        for start in (0.0, *multiples(fleet.first.goodput, end)):
            inside = multiples(fleet.second.goodput, min(end - start, fleet.first.goodput))
            loads += [edge for step in inside for edge in (start + step, (start + step) * (1 + 1e-6))]
    return sorted(load for load in loads if 0 < load <= end)


def multiples(step: float, end: float) -> list[float]:
    return [step * count for count in range(1, min(MOST_STEPS, math.floor(end / step)) + 1)]


def mark(hourly: Any, each: Any, even: BreakEven) -> None:
    if even.first is None or not 0 < even.first.middle < math.inf:
        return
    load = even.first.middle
    cost = fleet_of(even).per_hour(load)
    for axis, height in ((hourly, cost), (each, per_thousand(cost, load))):
        if math.isfinite(even.first.high) and even.first.high > even.first.low:
            axis.axvspan(even.first.low, even.first.high, color="#999999", alpha=0.25, linewidth=0)
        axis.axvline(load, color="#555555", linewidth=0.8, linestyle=":")
        axis.plot([load], [height], marker="o", color="black", markersize=5, zorder=5)
    hourly.annotate(
        f"break-even {spread(even.first)}/s",
        (load, cost),
        xytext=(8, -14),
        textcoords="offset points",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def finish(hourly: Any, each: Any, currency: str, end: float) -> None:
    hourly.set_ylabel(f"{currency} per hour")
    hourly.set_ylim(bottom=0)
    each.set_ylabel(f"{currency} per 1,000 requests")
    each.set_yscale("log")
    each.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    each.legend(loc="upper right", fontsize=9)
    each.set_xlim(0, end)
    each.set_xlabel("load, requests/s within the objectives")


def title(evens: Sequence[BreakEven]) -> str:
    return " and ".join(even.one.title for even in evens) + f" against {evens[-1].other.title}"
