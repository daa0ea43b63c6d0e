"""Runs of engines, as bench/engines records them."""

from __future__ import annotations

from bench.engines.results import DIRECT, PROXY, Level, Run

TIMES = {"p50": 10.0, "p95": 20.0, "p99": 30.0}


def a_run(
    subject: str,
    where: str = DIRECT,
    level: Level = Level(32),  # noqa: B008
    repeat: int = 0,
    tokens: float = 100,
    requests: int = 100,
    rate: float | None = None,
    short: int = 0,
) -> Run:
    return Run(
        subject, where, level, repeat, requests, completed=requests, failed=0, short=short, prompt_tokens=40,
        seconds=1.0, rate=rate, output_tok_s=tokens, req_s=tokens / 16, goodput=2.0, ttft=TIMES, tpot=TIMES, e2el=TIMES,
        cpu_s=1.0, proxy_cpu_s=0.02 if where == PROXY else None, rss_mb=500.0, gpu_mb=None, gpu_use=None,
    )  # fmt: skip
