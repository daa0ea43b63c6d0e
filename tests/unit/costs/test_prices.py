"""The table of prices: the template, rented and owned machines, and what is wrong with a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from xgen_proxy.costs.errors import CostError
from xgen_proxy.costs.prices import HOURS_PER_YEAR, Prices, read_prices, write_template

OWNED = "purchase = 8760\nyears = 2\npower_watts = 300\nidle_watts = 100\nper_kwh = 0.5\n"


def prices(tmp_path: Path, text: str) -> Prices:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    return read_prices(file)


def test_the_template_is_a_table_that_says_that_it_is_an_example(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    write_template(file)
    found = read_prices(file)
    assert [machine.name for machine in found.machines] == ["gpu", "cpu"]
    assert {machine.source for machine in found.machines} == {"an example"}
    assert found.currency == "$"


def test_the_template_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text("mine")
    with pytest.raises(CostError, match=r"prices.toml exists already and is not overwritten"):
        write_template(file)
    assert file.read_text() == "mine"
    with pytest.raises(CostError, match=r"cannot write .*: No such file or directory"):
        write_template(tmp_path / "none" / "prices.toml")


def test_a_rented_machine_costs_the_same_busy_or_not(tmp_path: Path) -> None:
    [gpu] = prices(tmp_path, "[machines.gpu]\nper_hour = 2.5\nupkeep_per_hour = 0.5").machines
    assert gpu.per_hour(0.0) == gpu.per_hour(1.0) == 3.0


def test_an_owned_machine_costs_its_purchase_and_its_power(tmp_path: Path) -> None:
    assert HOURS_PER_YEAR == 8760
    [cpu] = prices(tmp_path, f"[machines.cpu]\n{OWNED}replicas = 2").machines
    assert cpu.per_hour(0.0) == pytest.approx(0.5 + 0.05)
    assert cpu.per_hour(1.0) == pytest.approx(0.5 + 0.15)
    assert cpu.replicas == 2


def test_a_machine_is_found_by_the_first_name_that_there_is(tmp_path: Path) -> None:
    found = prices(tmp_path, "currency = '€'\n[machines.gpu]\nper_hour = 1\n[machines.vllm]\nper_hour = 2")
    assert found.currency == "€"
    assert found.machine("vllm", "gpu").name == "vllm"
    assert found.machine("other", "gpu").name == "gpu"
    with pytest.raises(CostError, match=r"no machine named tpu, only gpu, vllm; add a table \[machines.tpu\]"):
        found.machine("tpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[machines", "cannot read"),
        ("currency = '$'", r"has no \[machines.NAME\]"),
        ("[machines]\ngpu = 2.5", "machines.gpu is not a table"),
        ("[machines.gpu]\nper_hours = 2", "machines.gpu has the unknown key per_hours; known are per_hour, "),
        ("[machines.gpu]", "needs either per_hour"),
        (f"[machines.gpu]\nper_hour = 2\n{OWNED}", "needs either per_hour"),
        ("[machines.gpu]\npurchase = 2", "machines.gpu lacks years"),
        ("[machines.gpu]\nper_hour = 'two'", "per_hour is 'two'; it must be a number, 0 or more"),
        ("[machines.gpu]\nper_hour = true", "per_hour is True"),
        ("[machines.gpu]\nper_hour = nan", "per_hour is nan"),
        ("[machines.gpu]\nper_hour = -1", "per_hour is -1"),
        ("[machines.gpu]\nper_hour = 0", "costs nothing"),
        ("[machines.gpu]\nper_hour = 1\nreplicas = 1.5", "replicas is 1.5"),
        (f"[machines.gpu]\n{OWNED.replace('years = 2', 'years = 0')}", "years is 0"),
        (f"[machines.gpu]\n{OWNED.replace('300', '50')}", "power_watts is less than idle_watts"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CostError, match=message):
        prices(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CostError, match=r"there is no .*p.toml; `xgen-proxy cost --write-prices .*p.toml` writes one"):
        read_prices(tmp_path / "p.toml")
