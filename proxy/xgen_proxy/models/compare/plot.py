"""Two plots in one picture: size against divergence, and size against speed.

No background and mid-tone ink: legible on a white page and on a black one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK = "#767676"  # contrast 4.5 : 1 on white, 4.2 : 1 on a dark page
COLOURS = ("#e0722b", "#3b8ee0", "#35a06a", "#b06ad0")  # at least 3 : 1 on both
FLOOR = 1e-6  # nats: a model that equals its base has no place on a logarithmic axis
# Text stays text, and the same figures give the same file: it can be committed and compared.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "xgen",
    "figure.figsize": (9, 4.2),
    "savefig.transparent": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.color": INK,
    "legend.framealpha": 0.0,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def draw(result: dict[str, Any], file: Path) -> None:
    """`file`: its ending says the format."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2)
        divergence(left, result)
        speed(right, result)
        for axis in (left, right):
            axis.set_xlabel("size, MB")
            axis.margins(x=0.14)
            axis.legend(fontsize=8)
        figure.suptitle(f"Compared with {result['base']}", fontsize=10)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        plt.close(figure)


def divergence(axis: Any, result: dict[str, Any]) -> None:
    """By text, on a logarithmic axis; the base itself has none."""
    models = [model for model in result["models"] if model["name"] != result["base"]]
    texts = [text for text in models[0]["texts"] if text != "all"]
    sizes = [model["size_bytes"] / 1e6 for model in models]
    for text, colour in zip(texts, COLOURS, strict=False):
        values = [drawn(model, text) for model in models]
        errors = [model["texts"][text]["kld_error"] for model in models]
        axis.errorbar(sizes, values, yerr=errors, fmt="o-", color=colour, label=text, markersize=5, linewidth=1)
    axis.set_yscale("log")
    axis.margins(y=0.25)
    axis.set_ylabel("mean KL divergence, nats (log)")
    tops = [max(drawn(model, text) for text in texts) for model in models]
    labels(axis, [model["name"] for model in models], sizes, tops)


def drawn(model: dict[str, Any], text: str) -> float:
    return max(FLOOR, float(model["texts"][text]["kld"]))


def speed(axis: Any, result: dict[str, Any]) -> None:
    sizes = [model["size_bytes"] / 1e6 for model in result["models"]]
    highest: list[float] = [0.0] * len(sizes)
    for (key, label), colour in zip(
        (("prompt_tokens_per_s", "prompt"), ("generated_tokens_per_s", "generated")), COLOURS, strict=False
    ):
        found = [model[key] for model in result["models"]]
        middle = [each["median"] for each in found]
        reach = [[each["median"] - each["min"] for each in found], [each["max"] - each["median"] for each in found]]
        axis.errorbar(sizes, middle, yerr=reach, fmt="o", color=colour, label=label, markersize=5, capsize=3)
        highest = [max(pair) for pair in zip(highest, (each["max"] for each in found), strict=True)]
    axis.set_ylabel("tokens per second (minimum–maximum)")
    labels(axis, [model["name"] for model in result["models"]], sizes, highest)
    axis.set_ylim(0, 1.3 * max(highest))


def labels(axis: Any, names: list[str], xs: list[float], ys: list[float]) -> None:
    """Slanted, above the highest point of each model, so that models of nearly the same size stay legible."""
    for name, x, y in zip(names, xs, ys, strict=True):
        axis.annotate(name, (x, y), xytext=(-3, 6), textcoords="offset points", fontsize=8, rotation=60)
