"""Means, shares and percentiles, with their standard errors."""

from __future__ import annotations

import math
import statistics

import pytest

from xgen_proxy.models.compare.figures import Tokens, equal_answers, mean, percentile, share, spread, summary


def test_perplexity_of_a_die() -> None:
    """A model that gives each of six tokens the same chance."""
    found = summary(Tokens([math.log(6)] * 10, [0.0] * 10, [True] * 10))
    assert found["perplexity"] == pytest.approx(6)
    assert found["perplexity_error"] == pytest.approx(0)
    assert (found["tokens"], found["kld"], found["same_top"], found["same_top_error"]) == (10, 0, 1, 0)


def test_the_standard_error_is_that_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    assert mean(values) == pytest.approx((4, statistics.stdev(values) / math.sqrt(4)))
    assert mean([3.0]) == (3, 0)


def test_the_error_of_the_perplexity_follows_that_of_the_loss() -> None:
    losses = [1.0, 2.0, 3.0]
    found = summary(Tokens(losses, [0.1] * 3, [True] * 3))
    assert found["perplexity_error"] == pytest.approx(math.exp(2) * mean(losses)[1])


def test_share() -> None:
    assert share([True, True, True, False]) == pytest.approx((0.75, math.sqrt(0.75 * 0.25 / 3)))
    assert share([True]) == (1, 0)


def test_percentiles_lie_between_values() -> None:
    values = [float(value) for value in range(1001)]
    assert percentile(values[::-1], 0.999) == pytest.approx(999)
    assert percentile([0.0, 10.0], 0.999) == pytest.approx(9.99)
    assert percentile([7.0], 0.999) == 7


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}


def test_answers_are_equal_token_by_token() -> None:
    found = equal_answers([[1, 2, 3], [1, 2], [5], []], [[1, 2, 3], [1, 2, 3], [6], []])
    assert (found["same"], found["of"], found["share"]) == (2, 4, 0.5)
    assert found["same_length"] == statistics.median([3, 2, 0, 0])
