"""Plots as SVG. Only this module imports matplotlib, when needed; `make bench` installs it."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Text stays text, and the same figures give the same file: it can be committed and compared.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "xgen", "axes.grid": True, "grid.alpha": 0.3, "figure.figsize": (8, 5)}


def picture(text: str) -> Path:
    """An argparse type that fails at the start, not after the measurement, if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install -r requirements/bench.txt")
    return Path(text)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot

    matplotlib.rcParams.update(STYLE)
    return matplotlib.pyplot


def lines(path: Path, title: str, x: Sequence[float], x_label: str, panels: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw panels above each other with a common x axis: {y label: {series: values}}."""
    plt = pyplot()
    figure, axes = plt.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axis, (label, series) in zip(axes[:, 0], panels.items(), strict=True):
        for name, values in series.items():
            axis.plot(x, values, label=name, linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(0, max(max(values) for values in series.values()) * 1.1)
        if len(series) > 1:
            axis.legend(loc="upper right")
    axes[-1, 0].set_xlabel(x_label)
    save(plt, figure, title, path)


def bars(path: Path, title: str, panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """Draw panels of bars beside each other: {title: {name: (minimum, median, maximum)}}. Bars far longer than the rest
    are cut and labelled with their length."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (label, values) in zip(axes[0], panels.items(), strict=True):
        low, middle, high = zip(*list(values.values())[::-1], strict=True)
        below = [b - a for a, b in zip(low, middle, strict=True)]
        above = [b - a for a, b in zip(middle, high, strict=True)]
        bar = axis.barh(list(values)[::-1], middle, xerr=[below, above], capsize=3, height=0.5)
        end = min(max(high) * 1.25, max(statistics.median(middle) * 3, 0.0) or max(high) * 1.25)
        axis.set_xlim(min(0.0, *low), end)
        for patch, value in zip(bar, middle, strict=True):
            axis.text(min(max(value, 0.0), end * 0.7), patch.get_y() - 0.2, f" {number(value)}", fontsize=9)
        axis.set_xlabel(label)
    save(plt, figure, title, path)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(plt: Any, figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
