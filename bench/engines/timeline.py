"""Requests joining and leaving an engine's batch: its gauges, read 20 times a second during random arrivals."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.request
from typing import Any

from bench.engines.results import DIRECT, Level
from bench.engines.session import Session

GAUGES = {
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting"),
    "transformers": ("transformers:num_requests_running", "transformers:num_requests_waiting"),
    "llamacpp": ("llamacpp:requests_processing", "llamacpp:requests_deferred"),
}


def read(text: str, prefix: str) -> tuple[float, float]:
    """Running and waiting requests from a page of metrics, over all its engines."""
    found = []
    for name in GAUGES[prefix]:
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        found.append(sum(map(float, values)))
    return found[0], found[1]


class Watch(threading.Thread):
    """Reads the gauges until it is stopped: [seconds on the monotonic clock, running, waiting]."""

    def __init__(self, url: str, prefix: str, every: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.url, self.prefix, self.every = f"{url}/metrics", prefix, every
        self.ended = threading.Event()
        self.points: list[list[float]] = []

    def run(self) -> None:
        while not self.ended.wait(self.every):
            with contextlib.suppress(OSError):
                text = urllib.request.urlopen(self.url, timeout=5).read().decode()
                self.points.append([time.perf_counter(), *read(text, self.prefix)])

    def stop(self) -> None:
        self.ended.set()
        self.join()


def record(session: Session, requests: int, rate: float) -> dict[str, Any]:
    """The gauges and each request's start, first token and end, in seconds since the first arrival."""
    assert session.subject.gauges
    url = session.urls[DIRECT]
    watch = Watch(url, session.subject.gauges)
    watch.start()
    saved = session.client.run(url, session.subject, Level(), requests, rate, session.options.seed)
    watch.stop()
    return shaped(saved, watch.points, rate)


def shaped(saved: Any, points: list[list[float]], rate: float) -> dict[str, Any]:
    """Of what the load generator saved and of the gauges: both clocks are the kernel's monotonic one."""
    starts = saved.get("start_times") or []
    zero = min(starts, default=points[0][0] if points else 0.0)
    lines = zip(starts, saved.get("ttfts", []), saved.get("e2els") or ends(saved), strict=False)
    return {
        "rate": rate,
        "requests": sorted([start - zero, start - zero + first, start - zero + whole] for start, first, whole in lines),
        "gauges": [[at - zero, running, waiting] for at, running, waiting in points if at >= zero - 0.2],
    }


def ends(saved: Any) -> list[float]:
    """End to end, where the load generator saves only the gaps between tokens."""
    if latencies := saved.get("latencies"):
        return [float(each) for each in latencies]
    return [first + sum(gaps) for first, gaps in zip(saved.get("ttfts", []), saved.get("itls", []), strict=False)]
