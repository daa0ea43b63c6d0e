"""Figures from the tokens that were scored, each with its standard error. Pure, and without numpy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from xgen_proxy.values import frozen


@frozen
class Tokens:
    """For each token that was scored: −log of its probability, the divergence to the base in nats, and whether the
    model and its base would choose the same next token."""

    losses: list[float]
    divergences: list[float]
    same_top: list[bool]

    def extend(self, other: Tokens) -> None:
        self.losses.extend(other.losses)
        self.divergences.extend(other.divergences)
        self.same_top.extend(other.same_top)


def summary(tokens: Tokens) -> dict[str, Any]:
    """As llama.cpp's `llama-perplexity` prints them, standard errors too."""
    loss, loss_error = mean(tokens.losses)
    divergence, divergence_error = mean(tokens.divergences)
    same, same_error = share(tokens.same_top)
    return {
        "tokens": len(tokens.losses),
        "perplexity": math.exp(loss),
        "perplexity_error": math.exp(loss) * loss_error,  # the error of exp(x) is exp(x) times that of x
        "kld": divergence,
        "kld_error": divergence_error,
        "kld_99_9": percentile(tokens.divergences, 0.999),
        "same_top": same,
        "same_top_error": same_error,
    }


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    middle = math.fsum(values) / len(values)
    if len(values) < 2:
        return middle, 0.0
    squares = math.fsum((value - middle) ** 2 for value in values) / len(values)
    return middle, math.sqrt(squares / (len(values) - 1))


def share(values: Sequence[bool]) -> tuple[float, float]:
    """The share of True and its standard error."""
    part = sum(values) / len(values)
    return part, math.sqrt(part * (1 - part) / max(1, len(values) - 1))


def percentile(values: Sequence[float], fraction: float) -> float:
    """Between the two nearest values in proportion."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def equal_answers(base: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Answers as tokens. `same_length`: the tokens before the first difference, at the median."""
    pairs = list(zip(base, other, strict=True))
    same = [list(ours) == list(theirs) for ours, theirs in pairs]
    lengths = [
        next((at for at, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
        for pair in pairs
    ]
    part, error = share(same)
    return {
        "same": sum(same),
        "of": len(same),
        "share": part,
        "share_error": error,
        "same_length": statistics.median(lengths),
    }
