"""How the CPU time of reading a request grows with it: it must grow no faster, and stay short."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from tests.support.cpu_time import slowness, untraced
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.limits import Limits

LIMITS = Limits()
Body = dict[str, Any]

TEXTS = {"letters": "a", "escapes": "ab\n", "emoji": "😀"}
COUNTS = (500, 8_000, 50_000, 140_000)
SIZES = (LIMITS.body_bytes // 8, LIMITS.body_bytes - 10_000)
STALL = 0.1  # seconds, on the reference machine
TRIES = 4  # the best one counts, since other processes share the machine


def measured(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result; None if the request was refused."""
    started, result = time.thread_time(), None
    with contextlib.suppress(BadRequestError):
        result = run()
    return time.thread_time() - started, result


def fits(times: list[float], sizes: tuple[int, ...], limit: float) -> bool:
    steps = zip(times, times[1:], sizes, sizes[1:], strict=False)
    linear = all(after < 0.02 or after < 4 * before * large / small for before, after, small, large in steps)
    return linear and max(times) < limit


def check(
    bodies: Sequence[Body | int], sizes: tuple[int, ...], once: Callable[[bytes], float], stall: float = STALL
) -> None:
    """`once`: reads one body, or a stream of so many pieces, and tells the CPU seconds of it, which may be `stall` on
    the reference machine."""
    raws = [orjson.dumps(body) for body in bodies]
    best = [math.inf] * len(raws)
    with untraced():
        for _ in range(TRIES):
            limit = stall * slowness()  # now: other processes come and go
            best = [min(before, once(raw)) for before, raw in zip(best, raws, strict=True)]
            if fits(best, sizes, limit):
                return
    raise AssertionError(f"seconds at {sizes}: {best}")


def of_texts(place: Callable[[str], Body], text: str) -> list[Body]:
    """Bodies of SIZES, with a text made of `text`."""
    per_text = len(orjson.dumps(text)) - 2
    return [place(text * (size // per_text)) for size in SIZES]
