"""The costs as a text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from tests.unit.costs.builders import machine, repeat, run, two
from xgen_proxy.costs.costs import Range, Subject, break_evens, subjects
from xgen_proxy.costs.prices import Prices
from xgen_proxy.costs.report import data, number, percent, sentences, spread, text

PRICES = Prices("€", (machine("gpu", 2.5), machine("cpu", 0.2)))


def shown(found: list[Subject]) -> str:
    return text(PRICES, found, break_evens(found), ["mind the gap."])


def test_the_text() -> None:
    lines = [line.split() for line in shown(two(gpu=(38.0, 40.0))).splitlines()]
    assert ["gpu", "2.50", "a", "server", "an", "offer"] in lines
    assert lines[5][:7] == ["gpu", "vllm", "-", "39.0", "(38.0–40.0)", "100", "%"]
    assert ["cpu", "llama-server", "25", "%", "0.250", "0.222", "2.22", "0.741"] in lines
    assert lines[-1] == ["note:", "mind", "the", "gap."]
    assert "€ per 1,000 requests" in shown(two())


def test_owned_machines_have_two_prices_per_hour() -> None:
    [found] = subjects([run(1.0)], lambda name: machine(name, 1.0, 0.5))
    assert "1.00 idle, 1.50 at full use" in shown([found])


def test_unknown_tokens() -> None:
    [found] = subjects([run(repeat(1.0, tokens_out=None))], machine)
    assert shown([found]).split("\n\n")[1].splitlines()[1].split()[-2:] == ["?", "?"]


def test_the_break_even_in_words() -> None:
    [even] = break_evens(two(cpu=(0.9, 1.0, 1.1)))
    assert sentences(even) == [
        "Break-even: gpu (vllm) costs less than cpu (llama-server) above 12.0 requests/s; "
        "else cpu (llama-server) does.",
        "At 12.0 (10.8–13.2) requests/s, 1,036,800 a day, gpu (vllm) is used to 30 % and cpu (llama-server) "
        "needs 13 machines.",
        "What a full gpu cannot serve is cheaper on cpu up to that much more.",
    ]


@pytest.mark.parametrize(
    ("goodput", "first"),
    [
        (5.0, "No break-even: cpu (llama-server) costs less than gpu (vllm) at every load."),
        (20.0, "Break-even: gpu (vllm) costs less than cpu (llama-server) from 12.0 to 20.0 requests/s and above 25.0"),
    ],
)
def test_other_break_evens(goodput: float, first: str) -> None:
    [even] = break_evens(two(gpu=(goodput,)))
    assert sentences(even)[0].startswith(first)


def test_where_both_were_measured_is_told() -> None:
    runs = [run(goodput, machine=name, where="proxy") for name, goodput in {"gpu": 9.0, "cpu": 1.0}.items()]
    [even] = break_evens(subjects(runs, machine))
    assert sentences(even)[1] == "Both were measured through the proxy."
    assert data(PRICES, [], [even], [])["break_even"][0]["where"] == "proxy"
    [unknown] = break_evens(two())
    assert not any("measured" in sentence for sentence in sentences(unknown))
    assert data(PRICES, [], [unknown], [])["break_even"][0]["where"] is None
    cheap = {"gpu": machine("gpu", 0.1), "cpu": machine("cpu", 0.2)}
    for names in (cheap, dict(zip(cheap, reversed(cheap.values()), strict=True))):
        [even] = break_evens(subjects([replace(each, repeats=(repeat(1.0),)) for each in runs], names.__getitem__))
        assert [each.startswith("No break-even") for each in sentences(even)] == [True, False]
        assert sentences(even)[1] == "Both were measured through the proxy."


def test_a_gpu_that_is_always_cheaper() -> None:
    runs = [run(9.0), run(1.0, machine="cpu")]
    [even] = break_evens(subjects(runs, machine))
    assert sentences(even)[0] == "Break-even: gpu costs less than cpu above 1.00 requests/s; else cpu does."
    cheap = {"gpu": machine("gpu", 0.1), "cpu": machine("cpu", 0.2)}
    [even] = break_evens(subjects(runs, cheap.__getitem__))
    assert sentences(even) == ["No break-even: gpu costs less than cpu at every load."]


def test_the_json_has_no_infinity() -> None:
    found = two()
    made = json.loads(json.dumps(data(PRICES, found, break_evens(found), ["mind the gap."]), allow_nan=False))
    assert made["break_even"][0]["cheaper"] == [{"over": pytest.approx(12.0), "to": None}]
    assert made["subjects"][0]["runs"][0]["requests"]["middle"] == pytest.approx(2.5 / 144)
    assert [each["utilisation"] for each in made["subjects"][0]["at_utilisation"]] == [0.25, 0.5, 0.75, 1.0]
    assert made["machines"][1]["name"] == "cpu"
    assert made["notes"] == ["mind the gap."]


def test_what_is_infinite_is_null_in_json() -> None:
    found = subjects([run(1.0, rate=1.0), run(2.0, 0.0, rate=2.0)], machine)
    made = json.loads(json.dumps(data(PRICES, found, [], []), allow_nan=False))
    assert made["subjects"][0]["runs"][1]["requests"]["high"] is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0123456, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (1234.5, "1,234"), (0, "0"), (math.inf, "∞")],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_ranges_and_shares() -> None:
    assert spread(Range(1.0, 1.0, 1.0)) == "1.00"
    assert spread(Range(1.0, 2.0, math.inf)) == "2.00 (1.00–∞)"
    assert spread(None) == "?"
    assert (percent(0.5), percent(0.013), percent(0.0)) == ("50 %", "1.3 %", "0 %")
