from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mypy import api

from xgen_proxy.values import frozen

SOURCE = """
from xgen_proxy.values import frozen

@frozen
class Point:
    x: int
    y: int = 0

point = Point(1)
point.x = 2
"""


@frozen
class Point:
    x: int
    y: int = 0


def test_it_is_a_dataclass_with_slots() -> None:
    assert replace(Point(1), y=2) == Point(1, 2)
    with pytest.raises(AttributeError):
        Point(1).z = 2  # type: ignore[attr-defined]


def test_type_checkers_keep_it_frozen(tmp_path: Path) -> None:
    (tmp_path / "point.py").write_text(SOURCE)
    report, _, _ = api.run([str(tmp_path / "point.py"), "--follow-imports=silent"])
    assert 'Property "x" defined in "Point" is read-only' in report
    assert "Found 1 error" in report
