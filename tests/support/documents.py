"""Markdown documents as data: code blocks, commands, tables and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "nginx").glob("*.md")])
README = ROOT / "README.md"

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> Iterator[str]:
    """The commands in the page's shell blocks, with continuation lines joined."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield line


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def inline(page: Path) -> list[str]:
    """Texts in backticks outside of code blocks."""
    return re.findall(r"`([^`]+)`", prose(page))


def table_rows(page: Path, head: str) -> list[list[str]]:
    """The cells of the table whose first header cell is `head`."""
    _, found, rest = page.read_text().partition(f"| {head} |")
    assert found, f"{name(page)} has no table that begins with {head!r}"
    rows = []
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)
