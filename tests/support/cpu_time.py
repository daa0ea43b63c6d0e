"""Bounds on CPU time that hold on slow machines and under coverage."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import orjson

WORK = 140_000  # values
REFERENCE = 0.085  # CPU seconds of the work below on the machine that the bounds were set on
TRIES = 4  # the best one counts, since other processes share the machine


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Coverage makes Python code three to five times slower, so it pauses while time is measured."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


def slowness() -> float:
    """How much slower than the reference machine this one is now; at least 1.

    The work is a large body's, since what shares the machine slows large data down more than small data.
    """
    raw = orjson.dumps([{f"f{number}": "Hi"} for number in range(WORK)])
    best = float("inf")
    for _ in range(TRIES):
        began = time.thread_time()
        body = orjson.loads(raw)
        sum(len(value) for each in body for value in each.values())
        orjson.dumps(body)
        best = min(best, time.thread_time() - began)
    return max(1.0, best / REFERENCE)
