"""Plots as SVG, drawn by matplotlib, which is imported only here and only when asked: `make bench` installs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Text stays text, and the same figures give the same file: it can be committed and compared.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "xgen", "axes.grid": True, "grid.alpha": 0.3, "figure.figsize": (8, 5)}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot

    matplotlib.rcParams.update(STYLE)
    return matplotlib.pyplot


def lines(path: Path, title: str, x: Sequence[float], x_label: str, panels: Mapping[str, Mapping[str, Any]]) -> None:
    """One panel above the other, over the same x: {y label: {series: values}}."""
    plt = _pyplot()
    figure, axes = plt.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axis, (label, series) in zip(axes[:, 0], panels.items(), strict=True):
        for name, values in series.items():
            axis.plot(x, values, label=name, linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        if len(series) > 1:
            axis.legend(loc="lower right")
    axes[-1, 0].set_xlabel(x_label)
    _save(plt, figure, title, path)


def bars(path: Path, title: str, panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """One panel beside the other: {what: {name: (least, median, most)}}; the whiskers are least and most."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (label, values) in zip(axes[0], panels.items(), strict=True):
        names = list(values)[::-1]
        middle = [values[name][1] for name in names]
        spread = [
            [values[name][1] - values[name][0] for name in names],
            [values[name][2] - values[name][1] for name in names],
        ]
        axis.barh(names, middle, xerr=spread, capsize=3)
        axis.set_xlabel(label)
    _save(plt, figure, title, path)


def _save(plt: Any, figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
