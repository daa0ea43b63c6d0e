"""Every figure in docs/models.md and docs/benchmarks.md comes from a result file that says how it was measured."""

from __future__ import annotations

import datetime
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import BLOCK, ROOT, name
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


def test_the_tables_of_costs() -> None:
    """What `xgen-proxy cost --json` writes is what the page can show."""
    found = two(cpu=(0.9, 1.0, 1.1))
    prices = Prices("$", tuple(each.machine for each in found))
    content = {
        "conditions": CONDITIONS,
        "measured": [{"file": "h100.json", **CONDITIONS}, {"file": "cpu.json", "date": "20261126-010203"}],
        **data(prices, found, break_evens(found), []),
    }
    head, *runs = TABLES["cost_runs"](content)
    assert len({len(head), *map(len, runs)}) == 1
    assert runs[0][:6] == ("gpu", "2.50", "vllm", "", "40.0", "100 %")
    assert list(TABLES["cost_break_even"](content))[1:] == [("gpu", "cpu", "12.0 (10.8–13.2)", "above 12.0")]
    line = TABLES["computed"](content)
    assert line.startswith("h100.json: Measured on 2026-11-26 on Xeon, ")
    assert line.endswith("Computed by `xgen-proxy models compare a.gguf`.\n")
