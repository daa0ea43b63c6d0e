"""What a reader is told before the figures are believed."""

from __future__ import annotations

import pytest

from tests.unit.costs.builders import machine, repeat, run, subject
from xgen_proxy.costs.costs import break_evens, subjects
from xgen_proxy.costs.doubts import doubts, left_out
from xgen_proxy.costs.measurements import Run

CLOSED = "gpu (vllm): measured in a closed loop; under arriving requests it serves less in time."


def told(*runs: Run) -> list[str]:
    found = subjects(runs, machine)
    return doubts(found, break_evens(found))


def test_a_subject_that_served_nothing_in_time_is_left_out() -> None:
    runs = [run(1.0), run(0.0, subject="slow")]
    found = subjects(runs, machine)
    assert [each.name for each in found] == ["vllm"]
    assert left_out(runs, found) == ["gpu (slow) served no request within the objectives and is left out."]


def test_why_a_subject_is_left_out() -> None:
    late = [run(1.0, concurrency=1, subject="slow"), run(0.0, rate=2.0, subject="slow")]
    unsteady = [run(0.0, 1.0, rate=2.0, subject="unsteady")]
    runs = [run(1.0), *late, *unsteady]
    assert left_out(runs, subjects(runs, machine)) == [
        "gpu (slow) served requests within the objectives in a closed loop only and is left out.",
        "gpu (unsteady) had no load at which each repeat served some requests within the objectives and is left out.",
    ]


def test_failures() -> None:
    assert told(run(repeat(4.0, failed=1000), repeat(4.0, failed=500))) == [
        "gpu (vllm): 1,500 requests failed in its best run."
    ]


@pytest.mark.parametrize(
    "runs",
    [
        [run(3.9, rate=4.0)],
        [run(1.0, rate=1.0), run(3.9, rate=4.0)],
        [run(9.0, concurrency=8), run(3.9, rate=4.0)],
        [run(3.0, concurrency=8)],
        [run(3.0, concurrency=8), run(4.0, concurrency=16)],
    ],
)
def test_a_load_that_was_not_too_much(runs: list[Run]) -> None:
    [text] = but_closed(runs, told(*runs))
    assert text.startswith(
        f"gpu (vllm): its highest load, {subject(*runs).best.load}, was not too much for it; measure"
    )


@pytest.mark.parametrize(
    "runs",
    [
        [run(3.0)],
        [run(3.0, rate=4.0)],
        [run(9.0, concurrency=8), run(3.0, rate=4.0)],
        [run(3.9, rate=4.0), run(3.0, rate=8.0)],
        [run(4.0, concurrency=8), run(4.1, concurrency=16)],
        [run(4.0, concurrency=8), run(3.0, concurrency=16)],
    ],
)
def test_a_load_that_was(runs: list[Run]) -> None:
    assert but_closed(runs, told(*runs)) == []


def but_closed(runs: list[Run], texts: list[str]) -> list[str]:
    """Without the doubt about a closed loop, which those and only those have that know no other load."""
    only_closed = all(run.concurrency for run in runs)
    assert texts.count(CLOSED) == only_closed
    return [text for text in texts if text != CLOSED]


def test_machines_that_were_measured_in_different_places() -> None:
    cpu = run(1.0, machine="cpu", where="direct")
    assert told(run(4.0, where="proxy"), cpu) == [
        "gpu (vllm) was measured through the proxy and cpu (vllm) without the proxy: no fair comparison."
    ]
    assert told(run(4.0, where="direct"), cpu) == told(run(4.0), cpu) == []


def test_unlike_requests() -> None:
    cpu = run(repeat(1.0, tokens_in=200.0, tokens_out=20.0), machine="cpu", subject="llama")
    assert told(run(4.0), cpu) == [
        "gpu (vllm) and cpu (llama) had unlike requests, 200 in and 100 out against 200 in and 20 out tokens each: "
        "no fair comparison."
    ]


def test_requests_of_unknown_or_like_length() -> None:
    assert told(run(4.0), run(repeat(1.0, tokens_in=None, tokens_out=None), machine="cpu")) == []
    assert told(run(4.0), run(repeat(1.0, tokens_in=195.0, tokens_out=105.0), machine="cpu")) == []
