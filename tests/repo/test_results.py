"""Every figure in docs/models.md and docs/benchmarks.md comes from a result file that says how it was measured."""

from __future__ import annotations

import datetime
import json
import re
import runpy
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import children, memory_guard
from tests.support.documents import BLOCK, ROOT, name
from tests.support.fake_upstream import FakeUpstream, Talk
from tests.unit.costs.builders import two
from xgen_proxy.costs.costs import break_evens
from xgen_proxy.costs.prices import Prices
from xgen_proxy.costs.report import data

RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
PAGES = [page for page in (ROOT / "docs" / "models.md", ROOT / "docs" / "benchmarks.md") if page.exists()]
TABLES = runpy.run_path(str(ROOT / "docs" / "tables.py"))
GENERATED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
FIGURE = re.compile(r"\|\s*[*~<>$€]*\d[\d.,]*\**\s*(?:\(|%|[\w/]{,6}\s*\|)")  # a number with its unit or range
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
CONDITIONS: dict[str, Any] = {
    "command": "xgen-proxy models compare a.gguf",
    "date": "2026-11-26T01:02:03+00:00",
    "machine": {"cpu": "Xeon", "cores": 16, "memory_bytes": 128 * 2**30, "gpus": ["H100", "H100"], "os": "Linux"},
    "versions": {"python": "3.11.9", "vllm": "0.32.0"},
}


@pytest.mark.parametrize("file", RESULTS, ids=name)
def test_a_result_file_says_how_it_was_measured(file: Path) -> None:
    found = json.loads(file.read_text())["conditions"]
    assert found["command"]
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is not None
    assert found["machine"]["cpu"]
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_bytes"] > 0
    assert "gpus" in found["machine"]
    assert found["versions"]["python"]


@pytest.mark.parametrize("file", RESULTS, ids=name)
def test_a_page_has_the_command_that_measured_it(file: Path) -> None:
    command = json.loads(file.read_text())["conditions"]["command"]
    assert any(command in page.read_text() for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_table_of_figures_comes_from_a_result_file(page: Path) -> None:
    """test_docs.py compares the generated ones with their files."""
    written = GENERATED.sub("", BLOCK.sub("", page.read_text()))
    assert [row for row in ROW.findall(written) if FIGURE.search(row)] == []
    assert set(GENERATED.findall(page.read_text())) <= set(TABLES["RESULTS"]) | set(TABLES["TABLES"])


def test_figures_are_told_from_words() -> None:
    assert FIGURE.search("| vllm | 12.3 (12.0–12.7) |")
    assert FIGURE.search("| **17** | vllm |")
    assert FIGURE.search("| 20 ms | vllm |")
    assert not FIGURE.search("| tok/s | 256 tokens read in one batch |")
    assert not FIGURE.search("| every engine, 20 minutes | `make bench-engines` |")


def test_the_line_below_a_table() -> None:
    assert TABLES["provenance"](CONDITIONS) == (
        "Measured on 2026-11-26 on Xeon, 2 x H100, 16 cores, 128 GiB, by `xgen-proxy models compare a.gguf`; "
        "python 3.11.9, vllm 0.32.0.\n"
    )


def test_figures_with_their_spread() -> None:
    assert TABLES["spread"]([12.34, 12.0, 12.71]) == "12.3 (12.0–12.7)"
    assert TABLES["spread"]([1234.56]) == "1,235"
    assert TABLES["number"](0.0012345) == "0.00123"
    assert TABLES["number"](0) == "0"


def costs(*notes: str) -> dict[str, Any]:
    """As `xgen-proxy cost --json` writes them."""
    found = two(cpu=(0.9, 1.0, 1.1))
    prices = Prices("$", tuple(each.machine for each in found))
    return {
        "conditions": CONDITIONS,
        "measured": [{"file": "h100.json", **CONDITIONS}, {"file": "cpu.json", "date": "20261126-010203"}],
        **data(prices, found, break_evens(found), notes),
    }


def test_the_tables_of_costs() -> None:
    """What `xgen-proxy cost --json` writes is what the page can show."""
    content = costs()
    head, *runs = TABLES["cost_runs"](content)
    assert len({len(head), *map(len, runs)}) == 1
    assert runs[0][:6] == ("gpu", "2.50", "vllm", "", "40.0", "100 %")
    assert list(TABLES["cost_break_even"](content))[1:] == [
        ("gpu (vllm)", "cpu (llama-server)", "", "12.0 (10.8–13.2)", "above 12.0")
    ]
    line = TABLES["computed"](content)
    assert line.startswith("Computed by `xgen-proxy models compare a.gguf`.\n")
    assert "\n- h100.json: Measured on 2026-11-26 on Xeon, " in line


def test_what_would_mislead_stands_below_the_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = TABLES["result"]
    monkeypatch.setitem(result.__globals__, "RESULT_FILES", tmp_path)
    (tmp_path / "cost.json").write_text(json.dumps(costs("mind the gap.", "mind the step.")))
    table, notes, *_ = result("cost_runs").split("\n\n")
    assert table.startswith("| machine |")
    assert notes == "- mind the gap.\n- mind the step."
    assert "mind the gap" not in result("cost_break_even")
    assert "Computed by" not in result("cost_break_even"), "the command stands once"


def test_what_the_page_says_of_the_memory_guard_is_in_its_file() -> None:
    turns = json.loads((ROOT / "bench" / "results" / "memory-guard.json").read_text())["turns"]
    off, on = ([turn for turn in turns if turn["guard"] == guard] for guard in (False, True))
    per_answer = [statistics.median(turn["preempted"] / turn["answers"] for turn in own) for own in (off, on)]
    speed = [statistics.median(turn["tok_s"] for turn in own) for own in (off, on)]
    claim = (
        f"preemptions per answer fall from {per_answer[0]:.2f} to {per_answer[1]:.2f}, "
        f"and throughput falls by {1 - speed[1] / speed[0]:.0%}".replace("%", " %")
    )
    assert claim in (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_bench_of_the_memory_guard_records_the_version_of_its_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in an environment of its own, so that only vLLM itself can tell."""

    async def answer(talk: Talk) -> None:
        await talk.answer(200, {"version": "0.32.0"} if talk.path == "/version" else {})

    async def drive(*anything: object) -> memory_guard.Turn:
        return memory_guard.Turn(guard=True, answers=1, failed=0, preempted=0, tok_s=1.0, p50=1.0, p99=1.0)

    vllm = FakeUpstream()
    monkeypatch.setattr(vllm, "answer_check", answer)
    monkeypatch.setattr(memory_guard, "free_port", lambda: vllm.port)
    monkeypatch.setattr(children, "running", lambda *words, **options: nullcontext(SimpleNamespace()))
    monkeypatch.setattr(children, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(memory_guard, "until_ready", lambda *words: None)
    monkeypatch.setattr(memory_guard, "proxy", lambda *words: nullcontext(""))
    monkeypatch.setattr(memory_guard, "drive", drive)
    file = tmp_path / "guard.json"
    monkeypatch.setattr(sys, "argv", ["memory_guard", "--vllm", "vllm serve m", "--repeats", "1", "--json", str(file)])
    try:
        assert memory_guard.main() == 0
    finally:
        vllm.close()
    assert json.loads(file.read_text())["conditions"]["versions"]["vllm"] == "0.32.0"
