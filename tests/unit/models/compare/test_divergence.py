"""Against distributions made by hand, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xgen_proxy.models.compare.divergence import ROWS, kl_divergence, log_softmax, measure


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def chances(*rows: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, dtype=np.float64))


def test_probabilities_add_up_to_one() -> None:
    found = log_softmax(logits([1, 2, 3], [-500, 0, 500], [7, 7, 7]))
    assert np.exp(found).sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-12)
    assert found[2] == pytest.approx([-math.log(3)] * 3)
    assert found[1, 0] == pytest.approx(-1000)  # nothing overflows, and nothing is cut


def test_a_shift_of_all_logits_changes_nothing() -> None:
    assert log_softmax(logits([1, 2, 3])) == pytest.approx(log_softmax(logits([101, 102, 103])), abs=1e-6)


def test_divergence_of_coins() -> None:
    """Σ p log(p/q) for a fair and a 9 : 1 coin, both ways: it is not symmetric."""
    fair, bent = chances([0.5, 0.5]), chances([0.9, 0.1])
    assert kl_divergence(fair, bent) == pytest.approx([0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)])
    assert kl_divergence(bent, fair) == pytest.approx([0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)])


def test_divergence_of_geometric_distributions() -> None:
    """For p(k) = a(1 − a)^k and q(k) = b(1 − b)^k it is log(a/b) + (1 − a)/a · log((1 − a)/(1 − b))."""
    a, b, k = 0.3, 0.2, np.arange(400)
    ours, theirs = (np.log(x) + k * np.log(1 - x) for x in (a, b))
    closed = math.log(a / b) + (1 - a) / a * math.log((1 - a) / (1 - b))
    assert kl_divergence(ours[None], theirs[None]) == pytest.approx([closed])


def test_equal_rows_have_no_divergence() -> None:
    row = log_softmax(np.random.default_rng(1).normal(size=(5, 1000)).astype(np.float32))
    assert kl_divergence(row, row).tolist() == [0.0] * 5


def test_a_token_without_a_chance_adds_nothing() -> None:
    assert kl_divergence(chances([0.5, 0.5, 0]), chances([0.25, 0.75, 0])) == pytest.approx(
        kl_divergence(chances([0.5, 0.5]), chances([0.25, 0.75]))
    )


def test_measure_gives_each_token_its_figures() -> None:
    base = logits([0, math.log(3)], [5, 0])
    other = logits([0, 0], [0, 5])
    found = measure(base, other, [1, 0])
    assert found.losses == pytest.approx([math.log(2), math.log(1 + math.exp(5))])
    assert found.divergences[0] == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    assert found.same_top == [False, False]
    assert measure(base, base, [1, 0]).same_top == [True, True]


def test_rows_are_measured_alike_in_all_parts() -> None:
    random = np.random.default_rng(2)
    base, other = (random.normal(size=(2 * ROWS + 3, 50)).astype(np.float32) for _ in range(2))
    targets = random.integers(50, size=len(base)).tolist()
    whole = measure(base, other, targets)
    single = [measure(base[row : row + 1], other[row : row + 1], targets[row : row + 1]) for row in range(len(base))]
    assert whole.losses == pytest.approx([each.losses[0] for each in single])
    assert whole.divergences == pytest.approx([each.divergences[0] for each in single])
    assert whole.same_top == [each.same_top[0] for each in single]
