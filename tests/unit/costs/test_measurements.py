"""The formats of measurements, and what each lacks when it lacks something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.unit.costs.results import bench_record, vllm_result
from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.measurements import Measurements, Run, parse_source, read_measurements


def read(*sources: str, any_latency: bool = False) -> Measurements:
    return read_measurements(map(parse_source, sources), any_latency)


def only(found: Measurements) -> Run:
    [run] = found.runs
    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.json"


def test_a_result_of_vllms_load_generator(file: Path) -> None:
    file.write_text(json.dumps(vllm_result(goodput=8.0, throughput=10.0, rate=16, tokens=(256, 128), failed=3)))
    run = only(read(f"gpu={file}"))
    assert (run.machine, run.subject, run.load) == ("gpu", "llama", "16/s")
    assert (run.where, run.is_open) == (None, True)
    [repeat] = run.repeats
    assert (repeat.goodput, repeat.throughput, repeat.failed) == (8.0, 10.0, 3)
    assert (repeat.tokens_in, repeat.tokens_out) == (256, 128)


def test_results_appended_to_one_file_are_repeats(file: Path) -> None:
    results = [
        vllm_result(goodput=8.0, rate="inf", concurrency=32),
        vllm_result(goodput=9.0, rate="inf", concurrency=32),
    ]
    file.write_text("\n".join(map(json.dumps, results)))
    run = only(read(f"gpu={file}"))
    assert [repeat.goodput for repeat in run.repeats] == [8.0, 9.0]
    assert run.load == "32 at once"
    assert math.isinf(run.rate)


def test_other_loads_are_other_runs(file: Path, tmp_path: Path) -> None:
    file.write_text(json.dumps(vllm_result(goodput=8.0, rate=16)))
    (tmp_path / "other.json").write_text(json.dumps(vllm_result(goodput=8.0, rate=32, label="vllm 0.32")))
    found = read(f"gpu={file}", f"gpu={tmp_path / 'other.json'}")
    assert [(run.subject, run.load) for run in found.runs] == [("llama", "16/s"), ("vllm 0.32", "32/s")]
    assert found.conditions[0] == {"file": "run.json", "date": "20261126-010203", "model": "models/llama"}


def test_a_result_of_our_bench(file: Path) -> None:
    records = [
        bench_record("vllm", 8.0, streams=32),
        bench_record("vllm", 8.2, streams=32),
        bench_record("vllm", 7.0, where="proxy", streams=32),
        bench_record("vllm", 7.5, streams=32, shared_prefix=64),
        bench_record("llama-server", 1.0, rate=2.0),
    ]
    file.write_text(json.dumps({"conditions": {"command": "x"}, "runs": records, "skipped": []}))
    found = read(f"cpu={file}")
    assert [(run.subject, run.load, len(run.repeats)) for run in found.runs] == [
        ("vllm", "32 at once", 2),
        ("vllm, proxy", "32 at once", 1),
        ("vllm, 64 tokens shared", "32 at once", 1),
        ("llama-server", "2/s", 1),
    ]
    assert [(run.where, run.is_open) for run in found.runs] == [
        ("direct", False),
        ("proxy", False),
        ("direct", False),
        ("direct", True),
    ]
    assert found.runs[0].repeats[0].tokens_in == pytest.approx(256)
    assert found.runs[0].repeats[0].tokens_out == pytest.approx(128)
    assert found.conditions == ({"file": "run.json", "command": "x"},)
    assert only(read(f"cpu={file}:llama-server")).subject == "llama-server"
    assert only(read(f"cpu={file}:vllm/proxy")).subject == "vllm, proxy"


def test_records_whose_figures_have_vllms_names(file: Path) -> None:
    record = {"subject": "vllm", "where": "direct", "concurrency": 8, "figures": vllm_result(goodput=3.0)}
    file.write_text(json.dumps({"records": [record]}))
    assert only(read(f"gpu={file}")).repeats[0].goodput == 3.0


def test_figures_typed_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[gpu]\nrequests_per_s = 40\noutput_tokens_per_s = 4000\ninput_tokens_per_s = 8000\n"
        "[cpu]\nrequests_per_s = 0.5\nsubject = 'llama.cpp'\n"
    )
    gpu, cpu = read(str(file)).runs
    assert (gpu.machine, gpu.load, gpu.repeats[0].tokens_in, gpu.repeats[0].tokens_out) == ("gpu", "", 200, 100)
    assert (cpu.subject, cpu.repeats[0].tokens_out) == ("llama.cpp", None)
    assert only(read(f"cpu={file}")).subject == "llama.cpp"


def test_figures_typed_by_hand_as_json(file: Path) -> None:
    file.write_text('{"requests_per_s": 2}')
    assert only(read(f"gpu={file}")).repeats[0].goodput == 2


def test_without_goodput_the_way_to_measure_it_is_told(file: Path) -> None:
    file.write_text(json.dumps(vllm_result(goodput=None, throughput=10.0)))
    with pytest.raises(CostError, match=r"has no goodput: measure with `vllm bench serve --goodput ttft:500 tpot:50"):
        read(f"gpu={file}")
    assert only(read(f"gpu={file}", any_latency=True)).repeats[0].goodput == 10.0


def test_records_without_goodput_are_counted(file: Path) -> None:
    records = [bench_record("a", 1.0, streams=1), bench_record("a", None, streams=2)]
    file.write_text(json.dumps({"runs": records}))
    assert read(f"gpu={file}").skipped == 1


def test_a_name_with_a_colon_is_a_file_where_there_is_one(tmp_path: Path) -> None:
    file = tmp_path / "a:b.json"
    file.write_text(json.dumps(vllm_result(goodput=1.0)))
    assert only(read(f"gpu={file}")).subject == "llama"


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (vllm_result(goodput=1.0), "{}", "does not say on which machine it was measured; write MACHINE="),
        ({"runs": [bench_record("vllm", 1.0, streams=1)]}, "gpu={}:sglang", "has no subject sglang, only vllm"),
        ({"x": 1}, "gpu={}", "has no measurement; see"),
        ([], "gpu={}", "has no measurement; see"),
        ([1], "gpu={}", "has no measurement; see"),
        ({**vllm_result(goodput=1.0), "request_goodput": "fast"}, "gpu={}", "request_goodput is 'fast'; it must be a"),
        ({**vllm_result(goodput=1.0), "request_rate": "fast"}, "gpu={}", "request_rate is 'fast'; it must be a"),
        ({"gpu": {"requests_per_s": 1, "tokens": 1}}, "{}", "gpu has the unknown key tokens; known are requests_per_s"),
        ({"gpu": {"requests_per_s": -1}}, "{}", "requests_per_s is -1"),
    ],
)
def test_what_is_wrong_is_told(file: Path, content: Any, source: str, message: str) -> None:
    file.write_text(json.dumps(content))
    with pytest.raises(CostError, match=message):
        read(source.format(file))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot read .*: Expecting"), ("{}\n{", "cannot read"), (b"\xff", "cannot read")]
)
def test_files_that_cannot_be_read(file: Path, text: str | bytes, message: str) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CostError, match=message):
        read(f"gpu={file}")
    with pytest.raises(CostError, match="No such file or directory"):
        read(f"gpu={file}.none")
