"""The tables of bench/engines show runs of one load only, and no more than these can say."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from bench.engines import advice, table
from bench.engines.results import DIRECT, PROXY, Level, Results, Run, read
from tests.bench.runs import a_run
from tests.support.documents import ROOT

OPEN = Level(share=0.8)


def results(*runs: Run) -> Results:
    return Results(subjects={"vllm": {"weights": "m, bf16", "knob": ""}}, runs=list(runs))


def rows(found: Iterator[table.Row]) -> list[dict[str, str]]:
    head, *rest = found
    return [dict(zip(head, row, strict=True)) for row in rest]


@pytest.mark.parametrize(
    "unlike",
    [
        a_run("vllm", PROXY, repeat=1, tokens=200, requests=83),
        a_run("vllm", PROXY, repeat=1, tokens=200, short=3),
    ],
)
def test_pairs_that_differ_are_no_part_of_a_ratio(unlike: Run) -> None:
    alike = [a_run("vllm"), a_run("vllm", PROXY, tokens=90)]
    [row] = rows(table.ratios(results(*alike, a_run("vllm", repeat=1), unlike)))
    assert (row["pairs alike"], row["output tok/s"]) == ("1 of 2", "0.900")


def test_a_ratio_without_pairs_is_left_open() -> None:
    [row] = rows(table.ratios(results(a_run("vllm", short=1), a_run("vllm", PROXY))))
    assert (row["pairs alike"], row["output tok/s"], row["E2E p50"]) == ("0 of 1", "–", "–")


def test_a_pair_has_one_rate() -> None:
    assert table.alike(a_run("vllm", level=OPEN, rate=0.91728), a_run("vllm", PROXY, OPEN, rate=0.917281))
    assert not table.alike(a_run("vllm", level=OPEN, rate=0.91728), a_run("vllm", PROXY, OPEN, rate=0.92192))


def test_a_row_has_runs_of_the_newest_rate_and_names_it() -> None:
    old = a_run("vllm", level=OPEN, rate=0.273, tokens=1)
    new = [a_run("vllm", where, OPEN, 1, rate=0.395, tokens=5) for where in (DIRECT, PROXY)]
    found = rows(table.latencies(results(old, *new)))
    assert [(row["load"], row["output tok/s"]) for row in found] == [("open, 0.8 of capacity (0.395/s)", "5")] * 2
    assert table.load_row("vllm", OPEN, DIRECT, [new[0]])[1] == "open, 0.8 of capacity (0.395/s)"
    assert rows(table.ratios(results(old, *new)))[0]["pairs alike"] == "1 of 1"


@pytest.mark.parametrize(
    ("sizes", "requests", "shown"),
    [
        ((8, 8), "8", "10 / – / –"),
        ((19, 100), "19–100", "10 / – / –"),
        ((20, 99), "20–99", "10 / 20 / –"),
        ((100, 1024), "100–1,024", "10 / 20 / 30"),
    ],
)
def test_a_percentile_needs_enough_requests_in_each_run(sizes: tuple[int, int], requests: str, shown: str) -> None:
    runs = [a_run("vllm", repeat=repeat, requests=size) for repeat, size in enumerate(sizes)]
    [row] = rows(table.latencies(results(*runs)))
    assert row["requests per run"] == requests
    assert row["TTFT p50 / p95 / p99, ms"] == row["E2E p50 / p95 / p99, ms"] == shown


def test_the_claims_p95_needs_enough_requests_too() -> None:
    assert list(table.claims(results(a_run("vllm", level=Level(64), requests=19))))[-1][1].endswith("P95 – ms")


def test_missing_tokens_are_shown_where_there_are_any() -> None:
    whole, short = a_run("vllm"), a_run("vllm", repeat=1, short=4)
    assert rows(table.latencies(results(whole, short)))[0]["tokens short"] == "4"
    assert "tokens short" not in rows(table.latencies(results(whole)))[0]


def test_the_conditions_have_every_call() -> None:
    machine = {"cpu": "EPYC", "cores": 2, "memory_bytes": 2**34, "gpus": []}
    last = {"command": "c", "date": "2026-11-26", "machine": machine, "versions": {"vllm": "2"}}
    first = {"command": "b", "date": "2026-11-25", "machine": {**machine, "cpu": "Xeon"}, "versions": {"vllm": "1"}}
    load = {"input_len": 64, "output_len": 16, "repeats": 3, "slo_ttft": 1000, "slo_tpot": 100}
    found = Results(conditions={**last, "earlier": ["a", first]}, load=load)
    found.skip("vllm", DIRECT, "64 at once", 0, "the time was up")
    assert {row[0]: row[1] for row in table.conditions(found)} == {
        "conditions": "",
        "command": "`c`", "date": "2026-11-26", "machine": "EPYC, 2 cores, 16 GiB", "versions": "vllm 2",
        "earlier command": "`b`", "earlier date": "2026-11-25", "earlier machine": "Xeon, 2 cores, 16 GiB",
        "earlier versions": "vllm 1",
        "earlier command, without a record of date and machine": "`a`",
        "load": "64 tokens in, 16 out, repeats: 3",
        "goodput": "first token within 1000 ms, each further one within 100 ms",
        "left out": "vllm, direct, 64 at once",
    }  # fmt: skip


def test_the_advice_on_flags_says_how_far_the_base_spreads() -> None:
    measured = read(ROOT / "bench" / "results" / "engines-knobs.json")
    base = [run.output_tok_s for run in table.runs_of(measured, advice.BASE, DIRECT, Level(256))]
    page = re.sub(r"\s+", " ", (ROOT / "backends" / "vllm" / "README.md").read_text())
    assert f"{min(base):,.0f}–{max(base):,.0f} tok/s" in page
    assert f"vLLM {measured.conditions['versions']['vllm']}," in page
