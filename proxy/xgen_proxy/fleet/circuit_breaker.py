"""A circuit breaker for one replica: closed → open → half-open → closed, then a slow start. The caller passes the time.

    closed     requests are sent; three failures in a row open it
    open       no requests are sent for a while, twice as long each time
    half-open  one canary is under way: its success closes the breaker, its failure opens it again
    on trial   closed without a canary, where tokens may cost money: the next failure opens it again
    slow start after closing, and after the replica came back: its caches are cold, so its slots open one by one

https://martinfowler.com/bliki/CircuitBreaker.html
A 4xx says nothing about the replica's health, and 429 or 503 only that it is busy: neither counts as a failure. A 5xx
may be the request's fault, so that a client could close a replica to all others by repeating one such request. It
raises doubt instead: three in a row ask for a canary, and only that can open the breaker. A replica that gets no
canaries is convicted by evidence: three different requests in a row that it failed with 5xx and another one served.
"""

from __future__ import annotations

import math
from typing import Literal

State = Literal["closed", "open", "half-open"]

FAILURES = 3  # in a row
OPEN_S = 5.0
DOUBT_S = 5.0  # between two canaries that doubts ask for; one may evict a chat from an engine's cache
LONGEST_OPEN_S = 60.0
SLOW_START_S = 10.0
FIRST_FRACTION = 0.1  # of the slots, at the beginning of a slow start


class CircuitBreaker:
    """`now`: seconds of time.monotonic(). `failures`, `doubts`: in a row. `slow_start_at`: when it last closed,
    until the slow start is over. `on_trial`: the next failure opens it."""

    __slots__ = (
        "_doubted_at", "_evidence", "_open_until", "_openings",
        "doubts", "failures", "on_trial", "slow_start_at", "state",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state: State = "closed"
        self.failures = self.doubts = 0
        self.on_trial = False
        self.slow_start_at: float | None = None
        self._evidence: set[int] = set()  # requests that others served
        self._doubted_at = -math.inf
        self._openings = 0  # since the last successful request
        self._open_until = 0.0

    def failed(self, now: float) -> bool:
        """Record a failed request. Returns whether this opened the breaker."""
        self.failures += 1
        return self._open_if(self.failures >= FAILURES, now)

    def convicted(self, request: int, now: float) -> bool:
        """Record a request, by its hash, that was answered here with 5xx and served by another replica. Returns
        whether this opened the breaker."""
        self._evidence.add(request)
        return self._open_if(len(self._evidence) >= FAILURES, now)

    def _open_if(self, enough: bool, now: float) -> bool:
        if self.state == "open" or (self.state == "closed" and not enough and not self.on_trial):
            return False
        self.open(now)
        return True

    def doubted(self, now: float) -> bool:
        """Record a request that the engine answered with 5xx. Returns whether a canary should decide now."""
        self.doubts += 1
        if self.state != "closed" or self.doubts < FAILURES or now < self._doubted_at + DOUBT_S:
            return False
        self.doubts = 0
        self._doubted_at = now
        return True

    def succeeded(self) -> None:
        """Record a successful request. One that was sent before the breaker opened does not close it."""
        self.failures = self.doubts = 0
        if self._evidence:
            self._evidence.clear()
        if self.state == "closed":
            self._openings = 0
            self.on_trial = False

    def open(self, now: float) -> None:
        self.state = "open"
        self.on_trial = False
        self._evidence.clear()
        self._open_until = now + min(OPEN_S * 2**self._openings, LONGEST_OPEN_S)
        self._openings += 1

    def open_until_canary(self) -> None:
        """Open it with a canary due at once, for a replica that has not proved itself yet."""
        self.state, self._open_until = "open", -math.inf

    def try_half_open(self, now: float) -> bool:
        """Switch from open to half-open if its time is up, until close() or failed(). Returns whether it did."""
        if self.state != "open" or now < self._open_until:
            return False
        self.state = "half-open"
        return True

    def close(self, now: float) -> None:
        """Close it and begin a slow start."""
        self.state = "closed"
        self.failures = self.doubts = 0
        self.slow_start_at = now

    def end_slow_start(self, now: float) -> None:
        """Forget a slow start that is over."""
        if slow_start_fraction(self.slow_start_at, now) == 1.0:
            self.slow_start_at = None


def slow_start_fraction(began: float | None, now: float) -> float:
    """The fraction of a replica's slots that may be used, in (0, 1]. `began`: when its slow start did, if ever."""
    if began is None or now - began >= SLOW_START_S:
        return 1.0
    return max(FIRST_FRACTION, (now - began) / SLOW_START_S)
