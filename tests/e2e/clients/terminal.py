"""A recorded terminal session as an SVG that plays by itself and loads nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, LINE_HEIGHT, TOP, LEFT = 880, 20, 52, 20
COLUMNS = 99

STYLE = """\
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; fill: #d5dbe3 }
.screen { fill: #161b22; stroke: #57606a } .bar { fill: #57606a }
.typed { fill: #ffffff; font-weight: 600 } .note { fill: #8b949e } .killed { fill: #ff7b72; font-weight: 600 }
.good { fill: #7ee787 } .title { fill: #8b949e; text-anchor: middle }
@keyframes appear { from { opacity: 0 } to { opacity: 1 } }
g.line { animation: appear 0.01s linear both }
@media (prefers-color-scheme: dark) { .screen { stroke: #30363d } }
@media (prefers-reduced-motion: reduce) { g.line { animation: none } }
"""


@dataclass(frozen=True)
class Line:
    """`second`: when it appeared. `kind`: typed, output, note, killed or good."""

    second: float
    kind: str
    text: str


def svg(title: str, lines: Sequence[Line]) -> str:
    """Without animation, as in a printed page, all lines are there."""
    rows = [part for line in lines for part in wrapped(line)]
    height = TOP + LINE_HEIGHT * len(rows) + 10
    drawn = "\n".join(
        f'<g class="line" style="animation-delay: {row.second:.2f}s">'
        f'<text class="{row.kind}" x="{LEFT}" y="{TOP + LINE_HEIGHT * at + 8}">{html.escape(row.text)}</text></g>'
        for at, row in enumerate(rows)
    )
    dots = "".join(f'<circle class="bar" cx="{22 + 18 * at}" cy="20" r="6"/>' for at in range(3))
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">
<style>
{STYLE}</style>
<rect class="screen" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>
{dots}
<text class="title" x="{WIDTH / 2:g}" y="25">{html.escape(title)}</text>
{drawn}
</svg>
"""


def wrapped(line: Line) -> list[Line]:
    parts = [line.text[at : at + COLUMNS] for at in range(0, len(line.text), COLUMNS)] or [""]
    return [Line(line.second, line.kind, part) for part in parts]
