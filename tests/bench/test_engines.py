"""What bench/engines makes of its measurements, and the smallest real comparison."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.engines import __main__ as engines
from bench.engines import plot, results, session, subjects, table, timeline
from bench.engines.results import DIRECT, PROXY, Level, Results
from tests.bench.runs import a_run
from tests.support.documents import ROOT
from tests.support.unavailable import unavailable


@pytest.fixture
def found() -> Results:
    runs = [a_run("vllm", tokens=1500), a_run("vllm", PROXY, tokens=1470), a_run("transformers", tokens=100)]
    runs += [a_run("vllm", repeat=1, tokens=1600), a_run("vllm", level=Level(64), tokens=2000)]
    described = {"weights": "m, bf16", "knob": ""}
    line = {"rate": 2.0, "requests": [[0.0, 0.1, 0.5]], "gauges": [[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]]}
    return Results(subjects={"vllm": described, "transformers": described}, runs=runs, timelines={"vllm": line})


def test_a_file_holds_everything(found: Results, tmp_path: Path) -> None:
    found.write(tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == found


def test_what_is_measured_is_not_measured_again(found: Results) -> None:
    assert found.done("vllm", PROXY, Level(32), 0)
    assert not found.done("vllm", PROXY, Level(32), 1)


def test_the_capacity_is_the_first_repeats(found: Results) -> None:
    found.runs += [a_run("vllm", repeat=1, tokens=3000), a_run("vllm", PROXY, tokens=4000)]
    found.runs += [a_run("vllm", level=Level(64, shared_prefix=192), tokens=5000)]
    assert found.capacity("vllm") == 2000 / 16
    assert found.capacity("llama-server") is None


def test_tables_show_the_median_and_the_spread(found: Results) -> None:
    assert "1,550 (1,500–1,600)" in table.text(table.overview(found))
    assert "10 / 20 / 30" in table.text(table.latencies(found))
    assert "0.980" in table.text(table.ratios(found))


def test_the_sources_claims_stand_beside_the_figures(found: Results) -> None:
    assert [row[1] for row in table.claims(found)][1:] == ["16 ×", "2,000 tokens/s, E2E P95 20 ms"]


def test_a_claim_that_was_not_measured_says_so(found: Results) -> None:
    found.runs = [run for run in found.runs if run.level != Level(64)]
    assert table.text(table.claims(found)).splitlines()[-1].endswith("–")


def test_failures_are_reasons_to_doubt(found: Results) -> None:
    assert table.warnings(found) == []
    found.runs[0] = replace(found.runs[0], failed=1, short=5)
    assert len(table.warnings(found)) == 2


def test_plots_are_drawn(found: Results, tmp_path: Path) -> None:
    plot.throughput(found, tmp_path / "a.svg")
    plot.timelines(found, tmp_path / "b.svg")
    assert "requests at once" in (tmp_path / "a.svg").read_text()
    assert "in the batch" in (tmp_path / "b.svg").read_text()


def test_the_plot_has_every_engine(tmp_path: Path) -> None:
    runs = [a_run(name, level=Level(streams)) for name in subjects.KNOBS for streams in (64, 256)]
    plot.throughput(Results(runs=runs), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert len(subjects.KNOBS) > len(plot.COLOURS)
    assert [name for name in subjects.KNOBS if f">{name}<" not in text] == []


def test_no_two_engines_look_alike_in_the_plot() -> None:
    looks = list(itertools.islice(plot.styles(), len(subjects.KNOBS)))
    assert len(set(looks)) == len(looks)


def test_gauges_are_read_over_all_engines() -> None:
    page = 'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_running{engine="1"} 2.0\n'
    assert timeline.read(page + 'vllm:num_requests_waiting{engine="0"} 1.0\n', "vllm") == (5.0, 1.0)


def test_the_order_of_engines_rotates() -> None:
    flags = ["compare", "--json", "x.json", "--only", "llama-server", "llama-cpp-python", "--repeats", "2"]
    options = engines.parse(flags)
    plan = engines.sessions(options, [subjects.SUBJECTS[name](options) for name in options.only])
    names = [(subject.name, repeats) for subject, repeats in plan]
    assert names == [
        ("llama-server", [0]), ("llama-cpp-python", [0]), ("llama-cpp-python", [1]), ("llama-server", [1]),
    ]  # fmt: skip


def test_a_whole_vllm_command_is_taken_as_it_is() -> None:
    flags = [
        "knobs",
        "--json",
        "x.json",
        "--gpu",
        "--hf",
        "/m",
        "--vllm",
        "env A=1 python -m vllm serve /m",
    ]
    command = subjects.knob("eager", engines.parse(flags)).servers[0].command
    assert command[:7] == ("env", "A=1", "python", "-m", "vllm", "serve", "/m")
    assert command[-1] == "--enforce-eager"


def test_a_real_engine_is_measured_direct_and_through_the_proxy(tmp_path: Path, gguf: str) -> None:
    vllm, model = os.environ.get("XGEN_TEST_VLLM"), os.environ.get("XGEN_TEST_VLLM_MODEL")
    if not vllm or not model:
        unavailable("NOT TESTED: XGEN_TEST_VLLM is not set, and `vllm bench serve` is the load generator")
    file = tmp_path / "engines.json"
    python = str(Path(vllm).with_name("python"))
    command = [
        sys.executable, "-m", "bench.engines", "compare", "--only", "llama-server", "--levels", "1", "--rates", "0.5",
        "--repeats", "1", "--closed-seconds", "1", "--open-seconds", "1", "--load-seconds", "120", "--json", str(file),
        "--gguf", gguf, "--hf", model, "--vllm", vllm, "--vllm-python", python, "--warm-up", "1", "--timelines",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert set(written) == set(Results.__dataclass_fields__)
    assert {(run["where"], run["level"]["streams"]) for run in written["runs"]} == {
        (DIRECT, 1), (PROXY, 1), (DIRECT, None), (PROXY, None),
    }  # fmt: skip
    assert all(run["completed"] and not run["failed"] and run["output_tok_s"] for run in written["runs"])
    assert "command" in written["conditions"]


@pytest.mark.parametrize(
    ("paces", "streams", "expected"),
    [
        ({}, 8, 0.0),
        ({1: 2.0}, 1, 2.0),
        ({1: 2.0}, 8, 16.0),  # nothing is known of how it grows
        ({1: 2.0, 4: 2.0}, 64, 2.0),  # one at a time
        ({1: 2.0, 4: 8.0}, 64, 128.0),  # a batch with room
        ({1: 2.0, 4: 4.0}, 16, 8.0),
        ({1: 2.0, 4: 1.0}, 16, 1.0),  # it gets slower: hardly more than at 4
        ({1: 2.0, 64: 8.0}, 4, 8.0),
    ],
)
def test_the_pace_at_a_level_is_expected_from_smaller_ones(
    paces: dict[int, float], streams: int, expected: float
) -> None:
    runs = [a_run("vllm", level=Level(at), tokens=16 * pace) for at, pace in paces.items()]
    assert session.expected_pace(runs, streams) == pytest.approx(expected)
