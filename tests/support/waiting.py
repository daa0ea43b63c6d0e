"""Wait for a condition, never for time to pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], seconds: float = 10.0, what: str = "the condition to be true") -> T:
    """The first true value of `condition`. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.005
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)  # a condition is often a request to a server that is busy starting
    return value
