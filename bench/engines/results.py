"""What a comparison of engines found: one record per load, and the file that holds them all."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xgen_proxy.models.conditions import portable

DIRECT, PROXY = "direct", "proxy"
PERCENTILES = ("p50", "p95", "p99")
TIMES = ("ttft", "tpot", "e2el")  # as `vllm bench serve` calls them, in ms
NOT_STARTED = ("–", "–")  # where and level in `skipped`, if the engine did not start


@dataclass(frozen=True)
class Level:
    """A load. Closed: `streams` requests at once, each followed by the next. Open: Poisson arrivals at a rate that is
    the `share` of the highest throughput that the engine reached in closed loop. `shared_prefix`: tokens that prompts
    begin alike with, so that a prefix cache has something to find."""

    streams: int | None = None
    share: float | None = None
    shared_prefix: int = 0

    @property
    def plain(self) -> bool:
        """Closed, of prompts that have nothing in common."""
        return bool(self.streams) and not self.shared_prefix

    @property
    def name(self) -> str:
        prefix = f", {self.shared_prefix} tokens shared" if self.shared_prefix else ""
        return (f"{self.streams} at once" if self.streams else f"open, {self.share:g} of capacity") + prefix


@dataclass
class Run:
    """One load of one engine. Times in ms: {"p50", "p95", "p99"}. `short`: tokens missing from successful requests.
    `goodput`: requests per second within the objectives. `cpu_s`: CPU seconds of the engine, and of the proxy.
    `rss_mb`: the engine's peak memory. `gpu_mb`, `gpu_use`: peak memory and mean use in %, of all GPUs."""

    subject: str
    where: str
    level: Level
    repeat: int
    requests: int
    completed: int
    failed: int
    short: int
    prompt_tokens: int
    seconds: float
    rate: float | None
    output_tok_s: float
    req_s: float
    goodput: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    e2el: dict[str, float]
    cpu_s: float
    proxy_cpu_s: float | None
    rss_mb: float
    gpu_mb: float | None
    gpu_use: float | None


@dataclass
class Results:
    """`load`: what was asked for. `capacities`: requests per second by subject, which the rates of open loads are
    shares of. `skipped`: loads that were left out, and why. `timelines`: requests joining and leaving an engine's
    batch."""

    conditions: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    subjects: dict[str, Any] = field(default_factory=dict)
    capacities: dict[str, float] = field(default_factory=dict)
    starts_s: dict[str, list[float]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    timelines: dict[str, Any] = field(default_factory=dict)

    def done(self, subject: str, where: str, level: Level, repeat: int) -> bool:
        key = (subject, where, level, repeat)
        return any((run.subject, run.where, run.level, run.repeat) == key for run in self.runs)

    def add(self, run: Run) -> None:
        """With a run, what was left out before is left out no longer."""
        self.runs.append(run)
        self.skipped = [each for each in self.skipped if not makes_up(run, each)]

    def skip(self, subject: str, where: str, level: str, repeat: int, why: str) -> None:
        """Record a load that was left out, in place of what was recorded for it before."""
        entry = {"subject": subject, "where": where, "level": level, "repeat": repeat, "why": why}
        same = ("subject", "where", "level", "repeat")
        kept = [each for each in self.skipped if any(each.get(name) != entry[name] for name in same)]
        self.skipped = [*kept, entry]

    def newest(self, subject: str, level: Level, rate: float | None) -> Run | None:
        """The last run of a load, direct or through the proxy."""
        own = [run for run in self.runs if (run.subject, run.level) == (subject, level) and same_rate(run.rate, rate)]
        return own[-1] if own else None

    def capacity(self, subject: str) -> float | None:
        """The most requests per second of the first repeat, closed and direct, without shared beginnings. It is kept
        from its first use on, since later closed runs would change the rates of open loads."""
        if subject not in self.capacities:
            own = [run for run in self.runs if run.subject == subject and run.level.plain]
            first = [run.req_s for run in own if run.repeat == min(each.repeat for each in own) and run.where == DIRECT]
            found = max(first or [run.req_s for run in own], default=None)
            if found is None:
                return None
            self.capacities[subject] = found
        return self.capacities[subject]

    def write(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(portable(json.dumps(rounded(asdict(self)), indent=1)) + "\n")
        temporary.replace(path)


def read(path: Path) -> Results:
    found = json.loads(path.read_text())
    runs = [Run(**{**run, "level": Level(**run["level"])}) for run in found.pop("runs")]
    return Results(runs=runs, **found)


def makes_up(run: Run, skipped: dict[str, Any]) -> bool:
    """Whether a run is the one that was left out, or shows that the engine starts after all."""
    same = skipped["subject"] == run.subject and skipped.get("repeat", run.repeat) == run.repeat
    return same and (skipped["where"], skipped["level"]) in ((run.where, run.level.name), NOT_STARTED)


def same_rate(one: float | None, other: float | None) -> bool:
    """Equal in a file's five digits, or both of closed loads."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-4)


def rounded(value: Any) -> Any:
    """Floats to five significant digits: the file is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def spread(values: Iterable[float], digits: int = 0) -> str:
    """The median, and the minimum and maximum where there are several: 12 (11–14)."""
    found = sorted(values)
    if not found:
        return "–"
    middle = f"{statistics.median(found):,.{digits}f}"
    return middle if len(found) == 1 else f"{middle} ({found[0]:,.{digits}f}–{found[-1]:,.{digits}f})"
