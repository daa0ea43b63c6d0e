"""A circuit breaker for one replica: closed → open → half-open → closed, then a slow start. Pure; time is passed in.

    closed     requests go there; three failures in a row open it
    open       nothing goes there for a while, twice as long each time
    half-open  one probe is on its way: its success closes the breaker, its failure opens it again
    slow start after that, and after a replica came back: its slots are given out bit by bit, since caches are cold

https://martinfowler.com/bliki/CircuitBreaker.html
A 4xx says nothing of the replica's health, and 429 or 503 only that it is busy: neither counts.
"""

from __future__ import annotations

import math
from typing import Literal

State = Literal["closed", "open", "half-open"]

FAILURES = 3  # in a row
OPEN_S = 5.0
LONGEST_OPEN_S = 60.0
SLOW_START_S = 10.0
FIRST_SHARE = 0.1  # of its slots, at the start of a slow start


class CircuitBreaker:
    """`now`: time.monotonic(), seconds. `failures`: in a row."""

    __slots__ = ("_opened", "_slow_from", "_until", "failures", "state")

    def __init__(self) -> None:
        self.state: State = "closed"
        self.failures = 0
        self._opened = 0  # times, without a success of a request between
        self._until = 0.0
        self._slow_from = -math.inf

    def failed(self, now: float) -> bool:
        """Returns whether it opened by this."""
        self.failures += 1
        if self.state == "open" or (self.state == "closed" and self.failures < FAILURES):
            return False
        self.open(now)
        return True

    def open(self, now: float) -> None:
        self.state = "open"
        self._until = now + min(OPEN_S * 2**self._opened, LONGEST_OPEN_S)
        self._opened += 1

    def doubt(self) -> None:
        """Open until a probe, which is due at once: for one that nobody knows yet."""
        self.state, self._until = "open", -math.inf

    def succeeded(self) -> None:
        """A request was answered. What was sent before the breaker opened does not close it."""
        self.failures = 0
        if self.state == "closed":
            self._opened = 0

    def try_again(self, now: float) -> bool:
        """Is it time for a probe? Then it is half-open until close() or failed()."""
        if self.state != "open" or now < self._until:
            return False
        self.state = "half-open"
        return True

    def close(self, now: float) -> None:
        self.state = "closed"
        self.failures = 0
        self._slow_from = now

    def share(self, now: float) -> float:
        """How much of its slots it may be given, in (0, 1]."""
        since = now - self._slow_from
        return 1.0 if since >= SLOW_START_S else max(FIRST_SHARE, since / SLOW_START_S)
