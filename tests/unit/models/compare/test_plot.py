"""The picture: both panels, without a background of its own."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.unit.models.compare.results import result
from xgen_proxy.models.compare.plot import FLOOR, draw, drawn

FOUND = result(Q8=(145, 0.99, 0.98), Q4=(90, 0.9, 0.85))


def test_all_models_and_texts_are_in_the_picture(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.svg")
    words = [element.text for element in ElementTree.parse(tmp_path / "a.svg").iter() if element.text]
    for word in ("english", "korean", "prompt", "generated", "F16", "Compared with F16"):
        assert word in words, word
    assert words.count("Q8") == words.count("Q4") == 2


def test_it_has_no_background(tmp_path: Path) -> None:
    """On a dark page a white one would dazzle."""
    draw(FOUND, tmp_path / "a.svg")
    assert "#ffffff" not in (tmp_path / "a.svg").read_text()


def test_the_same_figures_give_the_same_file(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.svg")
    draw(FOUND, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_equals_its_base(tmp_path: Path) -> None:
    """No divergence has a place on a logarithmic axis: it is drawn at the lowest one that counts."""
    with warnings.catch_warnings(action="error"):
        draw(result(same=(270, 1, 1)), tmp_path / "a.svg")
    svg = ElementTree.parse(tmp_path / "a.svg")
    words = [element.text for element in svg.iter() if element.text]
    assert words.count("same") == 2, "in both panels"
    assert drawn(result(same=(270, 1, 1))["models"][1], "english") == FLOOR
