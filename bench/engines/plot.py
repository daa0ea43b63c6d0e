"""The plots of a comparison of engines. They need matplotlib, as bench/plot.py does."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import plot
from bench.engines.results import Results
from bench.engines.table import shown

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
MARKERS, LINES = "osD^vP", ["-", "--", ":"]
WAITING, RUNNING = "#b0b0b0", "#0072b2"


def throughput(results: Results, path: Path) -> None:
    """Output tokens per second by concurrency, one line per engine: the median, and a band from minimum to maximum."""
    plt = plot.pyplot()
    figure, axis = plt.subplots()
    names = list(dict.fromkeys(run.subject for run in results.runs))
    for name, (colour, marker, line) in zip(names, styles(), strict=False):  # the styles have no end
        levels = by_streams(results, name)
        middle = [statistics.median(values) for values in levels.values()]
        axis.plot(list(levels), middle, marker=marker, linestyle=line, color=colour, label=name)
        low, high = [min(values) for values in levels.values()], [max(values) for values in levels.values()]
        axis.fill_between(list(levels), low, high, color=colour, alpha=0.2, linewidth=0)
    ticks = sorted({run.level.streams for run in results.runs if run.level.streams})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("requests at once")
    axis.set_ylabel("output tokens per second")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3, frameon=False)
    plot.save(plt, figure, "Engines with the same model: median, minimum to maximum", path)


def styles() -> Iterator[tuple[str, str, str]]:
    """A colour, a marker and a line for each engine. The colours begin again with another line."""
    for line in itertools.cycle(LINES):
        for colour, marker in zip(COLOURS, MARKERS, strict=True):
            yield colour, marker, line


def by_streams(results: Results, name: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    own = [run for run in results.runs if run.subject == name]
    where = shown(own)
    for run in own:
        if run.where == where and run.level.plain and run.level.streams:
            found.setdefault(run.level.streams, []).append(run.output_tok_s)
    return dict(sorted(found.items()))


def timelines(results: Results, path: Path) -> None:
    """A column per engine: each request as a line (grey while it waits for its first token), above the gauges."""
    plt = plot.pyplot()
    names = list(results.timelines)
    figure, axes = plt.subplots(
        2, len(names), figsize=(5 * len(names), 6), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 2]
    )
    for column, name in enumerate(names):
        requests_of(axes[0][column], results.timelines[name])
        gauges_of(axes[1][column], results.timelines[name])
        axes[0][column].set_title(name, fontsize=10)
        axes[1][column].set_xlabel("seconds")
    axes[0][0].set_ylabel("request")
    axes[1][0].set_ylabel("requests")
    axes[1][0].set_ylim(bottom=0)  # once all are drawn: it would end their scaling
    axes[0][0].legend(loc="lower right", fontsize=8)
    axes[1][-1].legend(loc="best", fontsize=8)
    rate = f"{results.timelines[names[0]]['rate']:.2g} requests per second, arriving at random"
    plot.save(plt, figure, f"The same {rate}" if len(names) > 1 else rate, path)


def requests_of(axis: Any, timeline: dict[str, Any]) -> None:
    rows = range(1, len(timeline["requests"]) + 1)
    start, first, end = zip(*timeline["requests"], strict=True)
    axis.hlines(rows, start, first, color=WAITING, linewidth=3, label="waits for its first token")
    axis.hlines(rows, first, end, color=RUNNING, linewidth=3, label="gets tokens")


def gauges_of(axis: Any, timeline: dict[str, Any]) -> None:
    at, running, waiting = zip(*timeline["gauges"], strict=True)
    axis.step(at, running, where="post", color=RUNNING, label="in the batch")
    axis.step(at, waiting, where="post", color="#d55e00", label="waiting")
