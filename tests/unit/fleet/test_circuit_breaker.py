from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xgen_proxy.fleet.circuit_breaker import (
    DOUBT_S,
    FAILURES,
    FIRST_FRACTION,
    LONGEST_OPEN_S,
    OPEN_S,
    SLOW_START_S,
    CircuitBreaker,
    slow_start_fraction,
)


def opened(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    assert [breaker.failed(now) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


def test_failures_in_a_row_open_the_breaker() -> None:
    breaker = CircuitBreaker()
    for _ in range(5):
        for _ in range(FAILURES - 1):
            assert not breaker.failed(0)
        breaker.succeeded()
    assert breaker.state == "closed"
    assert opened().state == "open"


def test_doubts_in_a_row_ask_for_a_canary_now_and_then_and_open_nothing() -> None:
    breaker = CircuitBreaker()
    assert [breaker.doubted(0) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    assert not any(breaker.doubted(DOUBT_S - 0.1) for _ in range(10))
    assert breaker.doubted(DOUBT_S)
    assert (breaker.state, breaker.failures) == ("closed", 0)
    breaker.doubted(99)
    breaker.succeeded()
    assert breaker.doubts == 0


def test_different_requests_that_others_served_open_the_breaker() -> None:
    breaker = CircuitBreaker()
    assert not any(breaker.convicted(1, 0) for _ in range(10))
    assert not breaker.convicted(2, 0)
    breaker.succeeded()
    assert [breaker.convicted(request, 0) for request in (1, 2, 3)] == [False, False, True]
    assert breaker.state == "open"
    assert not breaker.convicted(4, 0)


def test_one_failure_ends_a_trial_and_one_success_passes_it() -> None:
    breaker = CircuitBreaker()
    breaker.close(0)
    breaker.on_trial = True
    assert breaker.failed(0)
    breaker.close(0)
    breaker.on_trial = True
    assert breaker.convicted(1, 0)
    breaker.close(0)
    breaker.on_trial = True
    breaker.succeeded()
    assert not breaker.failed(0)


def test_failures_while_open_do_not_prolong_it() -> None:
    breaker = opened(0)
    assert not breaker.failed(OPEN_S - 0.1)
    assert breaker.try_half_open(OPEN_S)


def test_success_while_open_does_not_close_it() -> None:
    breaker = opened(0)
    breaker.succeeded()
    assert breaker.state == "open"
    assert not breaker.try_half_open(OPEN_S - 0.01)


def test_half_open_allows_one_canary() -> None:
    breaker = opened(0)
    assert not breaker.try_half_open(OPEN_S - 0.01)
    assert breaker.try_half_open(OPEN_S)
    assert breaker.state == "half-open"
    assert not breaker.try_half_open(OPEN_S + 1)
    breaker.close(OPEN_S + 1)
    assert breaker.state == "closed"  # type: ignore[comparison-overlap]  # close() changed it


def test_each_failed_canary_doubles_the_open_time_up_to_a_limit() -> None:
    breaker, now, lengths = opened(0), 0.0, []
    for _ in range(7):
        began = now
        while not breaker.try_half_open(now):
            now += 0.5
        lengths.append(now - began)
        assert breaker.failed(now)
    assert lengths == [5, 10, 20, 40, 60, 60, 60]
    assert lengths[-1] == LONGEST_OPEN_S


def test_only_a_successful_request_resets_the_open_time() -> None:
    breaker = opened(0)
    assert breaker.try_half_open(OPEN_S)
    breaker.close(OPEN_S)
    for _ in range(FAILURES):
        breaker.failed(OPEN_S)
    assert not breaker.try_half_open(OPEN_S + 2 * OPEN_S - 0.1), "answers canaries, fails requests"
    assert breaker.try_half_open(OPEN_S + 2 * OPEN_S)
    breaker.close(20)
    breaker.succeeded()
    for _ in range(FAILURES):
        breaker.failed(20)
    assert breaker.try_half_open(20 + OPEN_S)


@pytest.mark.parametrize(
    ("after", "fraction"), [(0, FIRST_FRACTION), (0.5, FIRST_FRACTION), (5, 0.5), (SLOW_START_S, 1), (99, 1)]
)
def test_slow_start(after: float, fraction: float) -> None:
    breaker = CircuitBreaker()
    assert slow_start_fraction(breaker.slow_start_at, 0) == 1, "a new replica has no slow start"
    breaker.close(100)
    assert slow_start_fraction(breaker.slow_start_at, 100 + after) == pytest.approx(fraction)


def test_a_slow_start_that_is_over_is_forgotten() -> None:
    breaker = CircuitBreaker()
    breaker.close(100)
    breaker.end_slow_start(100 + SLOW_START_S - 0.1)
    assert breaker.slow_start_at == 100
    breaker.end_slow_start(100 + SLOW_START_S)
    assert breaker.slow_start_at is None


def test_open_until_canary_is_half_open_at_once() -> None:
    breaker = CircuitBreaker()
    breaker.open_until_canary()
    assert breaker.state == "open"
    assert breaker.try_half_open(0)


WAITS = {"wait": 1.0, "long wait": LONGEST_OPEN_S}  # after a long one a canary is due


@given(st.lists(st.sampled_from(["fail", "succeed", "canary", "close", *WAITS])))
@example(["fail"] * FAILURES + ["long wait", "canary"] * 4)
@example(["fail"] * FAILURES + ["long wait", "close"])
def test_breaker_never_stays_open_longer_than_the_limit(story: list[str]) -> None:
    breaker, now = CircuitBreaker(), 0.0
    for event in story:
        if event == "fail":
            breaker.failed(now)
        elif event == "succeed":
            breaker.succeeded()
        elif event == "canary" and breaker.try_half_open(now):
            breaker.failed(now)
        elif event == "close" and breaker.try_half_open(now):
            breaker.close(now)
        now += WAITS.get(event, 0)
        assert 0 < slow_start_fraction(breaker.slow_start_at, now) <= 1
    assert breaker.state == "closed" or breaker.try_half_open(now + LONGEST_OPEN_S)
