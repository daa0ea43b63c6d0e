"""docs/security.md names a test for each protection, and each of these tests exists."""

from __future__ import annotations

import re

import pytest

from tests.support.documents import ROOT, ticked

PAGE = ROOT / "docs" / "security.md"
ROWS = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
PROTECTIONS = [row for row in ROWS if row[0] != "| what could go wrong"]


def defined_tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"(?m)^(?:async )?def (test_\w+)", file.read_text())}


TESTS = defined_tests()


def test_each_boundary_has_a_table() -> None:
    boundaries = re.findall(r"(?m)^## \d\. (.+)$", PAGE.read_text())
    assert len(boundaries) == len(ROWS) - len(PROTECTIONS) == 6


@pytest.mark.parametrize("row", PROTECTIONS, ids=lambda row: row[0].strip("| "))
def test_each_protection_names_tests_that_exist(row: list[str]) -> None:
    danger, protection, tests = row
    assert danger
    assert protection
    named = ticked(tests)
    assert named
    assert set(named) <= TESTS
