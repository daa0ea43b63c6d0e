"""A result file that several calls of bench/engines wrote: one load, one capacity, and what each call was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import provenance
from bench.engines import __main__ as engines
from bench.engines.results import DIRECT, NOT_STARTED, PROXY, Level, Results, read
from tests.bench.runs import a_run

LOAD = {
    "command": "compare", "input_len": 64, "output_len": 16, "seed": 1, "slo_ttft": 1000, "slo_tpot": 100, "repeats": 3,
}  # fmt: skip


def call(command: str, day: int = 26, cpu: str = "Xeon", vllm: str = "0.26.0") -> dict[str, Any]:
    machine = {"cpu": cpu, "cores": 2, "memory_bytes": 2**34, "gpus": []}
    date = f"2026-11-{day}T01:02:03+00:00"
    return {"command": command, "date": date, "machine": machine, "versions": {"vllm": vllm}}


def options(file: Path, *flags: str, command: str = "compare") -> Any:
    return engines.parse([command, "--json", str(file), *flags])


def a_file(folder: Path, *levels: Level) -> Path:
    Results(load=LOAD, runs=[a_run("vllm", level=level) for level in levels]).write(folder / "engines.json")
    return folder / "engines.json"


def test_later_runs_do_not_change_the_capacity(tmp_path: Path) -> None:
    found = Results(runs=[a_run("vllm", tokens=1600)])
    assert found.capacity("vllm") == 100
    found.add(a_run("vllm", level=Level(64), tokens=3200))
    assert found.capacity("vllm") == 100
    found.write(tmp_path / "engines.json")
    assert read(tmp_path / "engines.json").capacity("vllm") == 100


def test_an_unknown_capacity_is_not_kept() -> None:
    found = Results()
    assert found.capacity("vllm") is None
    found.add(a_run("vllm", tokens=1600))
    assert found.capacity("vllm") == 100


def test_a_file_without_capacities_is_read(tmp_path: Path) -> None:
    file = a_file(tmp_path, Level(32))
    content = json.loads(file.read_text())
    del content["capacities"]
    file.write_text(json.dumps(content))
    assert read(file).capacity("vllm") == 100 / 16


@pytest.mark.parametrize(
    "flags",
    [
        ["--input-len", "65"], ["--output-len", "17"], ["--seed", "2"], ["--slo-ttft", "500"], ["--slo-tpot", "50"],
        ["--shared-prefix", "128"],
    ],
)  # fmt: skip
def test_a_file_of_another_load_is_not_continued(tmp_path: Path, flags: list[str]) -> None:
    file = a_file(tmp_path, Level(32), Level(64, shared_prefix=192))
    with pytest.raises(SystemExit, match=f"another {flags[0]}: give the same, or another --json"):
        engines.continued(options(file, *flags))


def test_a_file_of_another_command_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="another command"):
        engines.continued(options(a_file(tmp_path), command="knobs"))


def test_a_file_of_the_same_load_is_continued(tmp_path: Path) -> None:
    file = a_file(tmp_path, Level(32))
    found = engines.continued(options(file, "--repeats", "2", "--shared-prefix", "192"))
    assert len(found.runs) == 1
    assert found.load == LOAD  # with three repeats, which it has
    assert engines.continued(options(tmp_path / "new.json")).load == LOAD


def test_what_there_was_no_time_for_is_recorded(tmp_path: Path) -> None:
    file = a_file(tmp_path, Level(1))
    chosen = options(file, "--only", "vllm", "--levels", "1", "8", "--rates", "--repeats", "1")
    found = engines.continued(chosen)
    engines.out_of_time(chosen, found, engines.sessions(chosen, engines.chosen(chosen)))
    left = [(each["where"], each["level"], each["why"]) for each in read(file).skipped]
    why = "the time was up"
    assert left == [(PROXY, "1 at once", why), (DIRECT, "8 at once", why), (PROXY, "8 at once", why)]
    assert engines.continued(chosen).skipped == found.skipped


def test_an_engine_that_did_not_start_is_recorded_until_it_runs() -> None:
    found = Results()
    found.skip("vllm", *NOT_STARTED, 0, "no memory")
    found.add(a_run("vllm", repeat=1))
    found.add(a_run("transformers"))
    assert len(found.skipped) == 1
    found.add(a_run("vllm", repeat=0))
    assert found.skipped == []


def test_whole_conditions_of_earlier_calls_are_kept() -> None:
    first, second, third = call("a"), call("b", day=27, cpu="EPYC"), call("b", day=27, vllm="0.32.0")
    found = provenance.joined(third, provenance.joined(second, provenance.joined(first, {})))
    assert found == {**third, "earlier": [first, second]}


def test_a_call_that_differs_in_the_hour_only_is_kept_once() -> None:
    later = {**call("a"), "date": "2026-11-26T09:00:00+00:00"}
    assert provenance.joined(later, call("a"))["earlier"] == []


def test_commands_of_old_files_are_kept() -> None:
    found = provenance.joined(call("c"), {**call("b"), "earlier": ["a", "b"]})
    assert found["earlier"] == ["a", "b", call("b")]


def test_the_line_below_a_table_has_every_call() -> None:
    found = {**call("c", day=27), "earlier": ["a", call("b", cpu="EPYC")]}
    assert provenance.provenance(found) == (
        "Measured on 2026-11-27 on Xeon, 2 cores, 16 GiB, by `c`; vllm 0.26.0. "
        "Earlier, into the same file: on 2026-11-26 on EPYC, 2 cores, 16 GiB, by `b`; vllm 0.26.0. "
        "Before that, without a record of date and machine, by `a`.\n"
    )
