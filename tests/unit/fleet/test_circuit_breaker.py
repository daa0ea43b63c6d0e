from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.fleet.circuit_breaker import FAILURES, FIRST_SHARE, LONGEST_OPEN_S, OPEN_S, SLOW_START_S, CircuitBreaker


def opened(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    assert [breaker.failed(now) for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    return breaker


def test_failures_in_a_row_open_it() -> None:
    breaker = CircuitBreaker()
    for _ in range(5):
        for _ in range(FAILURES - 1):
            assert not breaker.failed(0)
        breaker.succeeded()
    assert breaker.state == "closed"
    assert opened().state == "open"


def test_late_failures_of_what_was_sent_before_change_nothing() -> None:
    breaker = opened(0)
    assert not breaker.failed(OPEN_S - 0.1)
    assert breaker.try_again(OPEN_S)


def test_a_late_success_does_not_close_it() -> None:
    breaker = opened(0)
    breaker.succeeded()
    assert breaker.state == "open"
    assert not breaker.try_again(OPEN_S - 0.01)


def test_half_open_lets_one_probe_through() -> None:
    breaker = opened(0)
    assert not breaker.try_again(OPEN_S - 0.01)
    assert breaker.try_again(OPEN_S)
    assert breaker.state == "half-open"
    assert not breaker.try_again(OPEN_S + 1)
    breaker.close(OPEN_S + 1)
    assert breaker.state == "closed"


def test_a_failed_probe_opens_it_for_twice_as_long_up_to_a_limit() -> None:
    breaker, now, lengths = opened(0), 0.0, []
    for _ in range(7):
        began = now
        while not breaker.try_again(now):
            now += 0.5
        lengths.append(now - began)
        assert breaker.failed(now)
    assert lengths == [5, 10, 20, 40, 60, 60, 60]
    assert lengths[-1] == LONGEST_OPEN_S


def test_only_a_request_that_is_answered_makes_the_next_opening_short_again() -> None:
    breaker = opened(0)
    assert breaker.try_again(OPEN_S)
    breaker.close(OPEN_S)
    for _ in range(FAILURES):
        breaker.failed(OPEN_S)
    assert not breaker.try_again(OPEN_S + 2 * OPEN_S - 0.1), "answers probes, fails requests"
    assert breaker.try_again(OPEN_S + 2 * OPEN_S)
    breaker.close(20)
    breaker.succeeded()
    for _ in range(FAILURES):
        breaker.failed(20)
    assert breaker.try_again(20 + OPEN_S)


@pytest.mark.parametrize(
    ("after", "share"), [(0, FIRST_SHARE), (0.5, FIRST_SHARE), (5, 0.5), (SLOW_START_S, 1), (99, 1)]
)
def test_slow_start(after: float, share: float) -> None:
    breaker = CircuitBreaker()
    assert breaker.share(0) == 1, "a new one starts at full speed"
    breaker.close(100)
    assert breaker.share(100 + after) == pytest.approx(share)


@given(st.lists(st.sampled_from(["fail", "succeed", "probe", "close", "wait"])))
def test_it_never_stays_open_for_longer_than_the_limit(story: list[str]) -> None:
    breaker, now = CircuitBreaker(), 0.0
    for event in story:
        if event == "fail":
            breaker.failed(now)
        elif event == "succeed":
            breaker.succeeded()
        elif event == "probe" and breaker.try_again(now):
            breaker.failed(now)
        elif event == "close" and breaker.state == "half-open":
            breaker.close(now)
        now += event == "wait"
        assert 0 < breaker.share(now) <= 1
    assert breaker.state == "closed" or breaker.try_again(now + LONGEST_OPEN_S)
