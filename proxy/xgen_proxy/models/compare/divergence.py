"""What one window of tokens says about a model: needs the logits of the model and of its base. Pure, in numpy.

The formulas are those of llama.cpp's `llama-perplexity --kl-divergence`
(https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/perplexity.cpp), which keeps the base's
probabilities in 16 bits and cuts them at exp(-16); here they are exact. Sums are in 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xgen_proxy.models.compare.figures import Tokens

ROWS = 32  # at a time: a row of 150,000 tokens takes 1.2 MB in 64 bits, and there are some five arrays

Logits = NDArray[np.float32]
Doubles = NDArray[np.float64]


def log_softmax(logits: Logits) -> Doubles:
    """The logarithm of each token's probability, by row."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(base: Doubles, other: Doubles) -> Doubles:
    """By row: Σ p·(log p − log q), in nats, where p is the base. Both are logarithms of probabilities.

    A token to which the base gives no chance adds nothing. Rounding may give −1e−17 for equal rows: 0.
    """
    chance = np.exp(base)
    with np.errstate(invalid="ignore"):  # 0 · (−∞ − …)
        parts = np.where(chance > 0, chance * (base - other), 0.0)
    sums: Doubles = parts.sum(axis=1)
    return np.maximum(sums, 0.0, out=sums)


def measure(base: Logits, logits: Logits, targets: Sequence[int]) -> Tokens:
    """`targets`: for each row the token that the text has there."""
    found = Tokens([], [], [])
    for start in range(0, len(targets), ROWS):
        part = slice(start, start + ROWS)
        ours, theirs = log_softmax(logits[part]), log_softmax(base[part])
        wanted = np.asarray(targets[part])
        found.losses.extend((-ours[np.arange(len(wanted)), wanted]).tolist())
        found.divergences.extend(kl_divergence(theirs, ours).tolist())
        found.same_top.extend((ours.argmax(axis=1) == theirs.argmax(axis=1)).tolist())
    return found
