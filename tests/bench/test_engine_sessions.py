"""What a session of bench/engines plans: all runs of a load have as many requests, at one rate."""

from __future__ import annotations

import argparse
from typing import Any, cast

import pytest

from bench.engines import load, session
from bench.engines.results import DIRECT, PROXY, Level, Results, Run
from bench.engines.session import Session
from bench.engines.subjects import Subject
from tests.bench.runs import a_run

OPTIONS = argparse.Namespace(closed_seconds=4.0, open_seconds=8.0, load_seconds=25.0)
OPEN = Level(share=0.8)
SAVED = {
    "completed": 3, "total_output_tokens": 44, "total_input_tokens": 192, "duration": 2.0, "output_throughput": 22.0,
    "request_throughput": 1.5, "request_goodput": 0.5, "p50_ttft_ms": 7.0, "p95_e2el_ms": 9.0,
}  # fmt: skip


class Recorder(Session):
    """Measures nothing. Runs through the proxy and later repeats are faster, which changes what the time allows."""

    def run(self, where: str, level: Level, repeat: int, requests: int, rate: float | None) -> Run:
        pace = {DIRECT: 30.0, PROXY: 50.0}[where] + 10 * repeat
        return a_run("vllm", where, level, repeat, tokens=16 * pace, requests=requests, rate=rate)


def a_session(*runs: Run, ends: float = float("inf")) -> Recorder:
    subject, urls = Subject("vllm", "vllm", "m", ()), {DIRECT: "http://a", PROXY: "http://b"}
    return Recorder(OPTIONS, subject, cast(Any, None), Results(runs=list(runs)), [], 0, urls, ends)


@pytest.mark.parametrize("level", [Level(32), Level(32, shared_prefix=192), OPEN])
def test_all_runs_of_a_load_have_the_same_requests(level: Level) -> None:
    running = a_session(a_run("vllm", level=Level(1), tokens=16 * 20))
    for repeat in range(3):
        for where in (DIRECT, PROXY):
            running.measure(where, level, repeat)
            running.measure(where, Level(64), repeat)  # a faster load, which changes what is known of the engine
    own = [run for run in running.results.runs if run.level == level]
    assert len(own) == 6
    assert len({(run.requests, run.rate) for run in own}) == 1


@pytest.mark.parametrize(
    ("level", "pace", "requests"),
    [
        (Level(32), 0.0, 128),  # nothing is known
        (Level(32), 25.0, 96),  # 100 fit into 4 s: three waves
        (Level(32), 15.0, 32),
        (Level(32), 2.0, 32),  # one at least, if it takes longer
        (Level(32), 1000.0, 128),
        (Level(1), 0.3, 3),
        (Level(2), 0.3, 4),
        (Level(600), 1000.0, 600),  # no second wave beyond MOST
        (Level(6, shared_prefix=192), 0.0, 24),
        (Level(6, shared_prefix=192), 1.0, 12),  # as many for each of four beginnings
    ],
)
def test_a_closed_load_is_whole_waves(level: Level, pace: float, requests: int) -> None:
    assert session.waves(level, pace * OPTIONS.closed_seconds) == requests


def test_a_continued_file_keeps_its_newest_number() -> None:
    runs = [a_run("vllm", level=Level(32), requests=count, repeat=0) for count in (35, 67)]
    requests, rate, expected = a_session(*runs).planned(Level(32))
    assert (requests, rate, expected) == (67, None, 67 / (100 / 16))


def test_a_continued_file_keeps_the_requests_of_a_rate() -> None:
    closed, known = a_run("vllm", tokens=160), a_run("vllm", level=OPEN, rate=8.0, requests=50)
    assert a_session(closed, known).planned(OPEN) == (50, 8.0, 50 / 8.0)
    other = a_run("vllm", level=OPEN, rate=7.9, requests=50)
    assert a_session(closed, other).planned(OPEN) == (64, 8.0, 8.0)


def test_what_the_time_does_not_allow_is_recorded_until_it_is_measured() -> None:
    running = a_session(a_run("vllm", level=Level(8), tokens=16 * 0.1))
    running.measure(DIRECT, Level(32), 1)
    running.measure(DIRECT, Level(32), 1)
    [skipped] = running.results.skipped
    assert (skipped["where"], skipped["level"], skipped["repeat"]) == (DIRECT, "32 at once", 1)
    assert skipped["why"].startswith("would take 80 s")
    for where, repeat in ((PROXY, 1), (DIRECT, 0)):
        running.results.add(a_run("vllm", where, repeat=repeat))
        assert running.results.skipped == [skipped]
    running.results.add(a_run("vllm", DIRECT, repeat=1))
    assert running.results.skipped == []


def test_the_figures_of_a_run() -> None:
    found = load.figures(SAVED, requests=4, output_len=16)
    assert (found["requests"], found["completed"], found["failed"], found["short"]) == (4, 3, 1, 3 * 16 - 44)
    assert (found["output_tok_s"], found["req_s"], found["goodput"]) == (22.0, 1.5, 0.5)
    assert found["ttft"] == {"p50": 7.0, "p95": 0.0, "p99": 0.0}
    assert found["e2el"]["p95"] == 9.0
    assert load.figures({**SAVED, "request_goodput": None, "request_goodput:": 0.7}, 4, 16)["goodput"] == 0.7
