"""The distance between two distributions, of which each engine names the likeliest tokens only."""

from __future__ import annotations

import math
import random

import pytest

from xgen_proxy.models.served.distance import Distribution, Likely, Position, compare, figures


def named(*probabilities: float, first: int = 0) -> list[Likely]:
    return [Likely(first + n, f"t{first + n}", math.log(p)) for n, p in enumerate(probabilities)]


def by_text(distribution: Distribution) -> list[Likely]:
    return [Likely(None, each.text, each.logprob) for each in distribution]


def test_an_engine_is_no_distance_from_itself() -> None:
    found = compare(named(0.6, 0.3), named(0.6, 0.3))
    assert (found.same_top, found.kld) == (True, 0.0)
    assert found.named == pytest.approx(0.9)


def test_the_divergence_with_the_rest_as_one_token() -> None:
    found = compare(named(0.5, 0.3), named(0.4, 0.4))
    expected = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4) + 0.2 * math.log(0.2 / 0.2)
    assert found.kld == pytest.approx(expected)


def test_a_token_that_only_one_names_is_part_of_the_rest() -> None:
    found = compare(named(0.5, 0.3), [*named(0.5), *named(0.3, first=9)])
    assert (found.same_top, found.kld) == (True, 0.0)
    assert found.named == pytest.approx(0.5)


def test_it_is_never_more_than_the_divergence_over_the_whole_vocabulary() -> None:
    rng = random.Random(0)
    for _ in range(200):
        p, q = ([rng.random() ** 4 + 1e-4 for _ in range(60)] for _ in range(2))
        p, q = ([x / sum(each) for x in each] for each in (p, q))
        whole = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        top = [sorted(named(*each), key=lambda likely: -likely.logprob)[:20] for each in (p, q)]
        assert compare(*top).kld <= whole + 1e-9


def test_different_top_tokens() -> None:
    assert compare(named(0.5, 0.3), named(0.3, 0.5)).same_top is False


def test_either_of_two_that_tie_counts_as_the_top() -> None:
    assert compare(named(0.4, 0.4), named(0.3, 0.5)).same_top is True


def test_tokens_without_ids_are_compared_by_text() -> None:
    first, second = named(0.5, 0.3), by_text(named(0.4, 0.4))
    assert compare(first, second).kld == pytest.approx(compare(first, named(0.4, 0.4)).kld)
    assert compare(first, by_text(named(0.3, 0.5))).same_top is False


@pytest.mark.parametrize("text", ["", "\N{REPLACEMENT CHARACTER}"])
def test_a_text_that_is_part_of_a_character_decides_nothing(text: str) -> None:
    """It may hide the top token, since several tokens have it."""
    unclear = Likely(None, text, math.log(0.2))
    found = compare(named(0.5, 0.3), [*by_text(named(0.5)), unclear])
    assert (found.same_top, found.kld) == (None, 0.0)
    assert found.named == pytest.approx(0.5)


def test_the_ids_tell_tokens_of_the_same_text_apart() -> None:
    same_text = [Likely(1, "\N{REPLACEMENT CHARACTER}", -0.5), Likely(2, "\N{REPLACEMENT CHARACTER}", -1.0)]
    assert compare(same_text, same_text).same_top is True


def test_figures() -> None:
    found = figures([Position(True, 0.1, 0.9)] * 3 + [Position(False, 0.5, 0.7), Position(None, 0.1, 0.5)])
    assert (found.positions, found.undecided, found.top1) == (5, 1, 0.75)
    assert found.top1_se == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found.kld == pytest.approx(0.18)
    assert found.kld_se == pytest.approx(0.08)
    assert found.named == pytest.approx(0.78)


def test_no_share_where_most_positions_are_undecided() -> None:
    assert figures([Position(None, 0.1, 0.5)] * 3 + [Position(True, 0.1, 0.5)]).top1 is None
