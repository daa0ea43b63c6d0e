"""The plot: whole in the file, the same each time, with the break-even where it was computed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.unit.costs.builders import machine, run, two
from xgen_proxy.costs import plot
from xgen_proxy.costs.costs import break_evens, subjects
from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.fleets import Fleet, Spill


def test_the_plot(tmp_path: Path) -> None:
    evens = break_evens(two(cpu=(0.9, 1.0, 1.1)))
    for name in ("one.svg", "two.svg"):
        plot.draw(tmp_path / name, "€", evens)
    text = (tmp_path / "one.svg").read_text()
    ElementTree.fromstring(text)
    for words in (
        "€ per hour",
        "€ per 1,000 requests",
        "break-even 12.0 (10.8–13.2)/s",
        "gpu only, 40.0/s each",
        "gpu always on, cpu for the rest",
    ):
        assert words in text
    assert text == (tmp_path / "two.svg").read_text()


def test_a_plot_without_a_break_even(tmp_path: Path) -> None:
    plot.draw(tmp_path / "plot.svg", "$", break_evens(two(gpu=(5.0,))))
    assert "break-even" not in (tmp_path / "plot.svg").read_text()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CostError, match="cannot write"):
        plot.draw(tmp_path / "none" / "plot.svg", "$", break_evens(two()))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    plot.need_matplotlib()
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(CostError, match=r"pip install '\.\[models\]' in a checkout of xgen-proxy"):
        plot.need_matplotlib()


def test_both_sides_of_each_step_are_drawn() -> None:
    cpu = Fleet("cpu", fixed=1.0, extra=0.0, goodput=1.0)
    costs = [cpu.per_hour(load) for load in plot.steps(cpu, 5.0)]
    assert set(costs) == {1.0, 2.0, 3.0, 4.0, 5.0}
    spill = Spill(Fleet("gpu", fixed=2.5, extra=0.0, goodput=2.5), cpu)
    loads = plot.steps(spill, 5.0)
    assert {2.5, 3.5, 4.5} <= set(loads)
    assert loads == sorted(loads)
    assert loads[0] > 0
    assert loads[-1] <= 5.0


def test_the_break_even_is_in_the_middle_of_things() -> None:
    assert plot.longest(break_evens(two())) == pytest.approx(64.0)
    low = break_evens(subjects([run(4000.0), run(1.0, machine="cpu")], machine))
    assert plot.longest(low) == pytest.approx(10.0)
    assert plot.longest(break_evens(two(gpu=(5.0,)))) == pytest.approx(8.0)
