"""The tables and the advice."""

from __future__ import annotations

from tests.unit.models.compare.results import result
from xgen_proxy.models.compare.commands import report
from xgen_proxy.models.compare.report import advice, cost_rows, method, quality_rows, summary_rows


def test_the_smallest_that_keeps_enough_in_every_text_is_advised() -> None:
    found = advice(result(Q8=(145, 0.99, 0.98), Q5=(112, 0.97, 0.955), Q4=(105, 0.96, 0.93), Q3=(80, 0.8, 0.7)))
    assert found == (
        "Q5 (112 MB, 41 % of F16) is the smallest that keeps 95 % of the top tokens in every text "
        "(at least 95.5 ± 0.4 % in korean); Q4 has 93.0 ± 0.4 % in korean, Q3 has 70.0 ± 0.4 % in korean."
    )


def test_none_is_advised_where_none_keeps_enough() -> None:
    found = advice(result(Q8=(145, 0.9, 0.94), Q4=(105, 0.8, 0.7)))
    assert found == ("None keeps 95 % of F16's top tokens in every text: the nearest, Q8, has 90.0 ± 0.4 % in english.")


def test_the_smallest_of_all_may_be_good_enough() -> None:
    assert advice(result(Q8=(145, 0.99, 0.98), Q6=(120, 0.97, 0.96))).endswith("96.0 ± 0.4 % in korean).")


def test_the_base_has_no_distance_to_itself() -> None:
    rows = list(quality_rows(result(Q8=(145, 0.99, 0.98))))
    assert rows[1] == ("F16", "english", "17.03 ± 0.51", "base", "", "", "")
    assert rows[4] == ("Q8", "english", "17.03 ± 0.51", "0.00100 ± 0.00010", "0.030", "99.0 ± 0.4", "7 of 30")
    assert rows[5][-1] == ""  # nothing was asked in Korean
    assert rows[6][-1] == "9 of 50"


def test_a_single_text_is_its_own_total() -> None:
    found = result(Q8=(145, 0.99, 0.98))
    for model in found["models"]:
        model["texts"] = {"own.txt": model["texts"]["english"], "all": model["texts"]["english"]}
    rows = list(quality_rows(found))
    assert [row[1] for row in rows[1:]] == ["own.txt", "own.txt"]
    assert rows[-1][-1] == "9 of 50"


def test_costs_and_the_summary_have_a_line_for_each_model() -> None:
    found = result(Q8=(145, 0.99, 0.98))
    assert list(cost_rows(found))[2] == (
        "Q8", "145", "5.25", "12.35 (9.00–15.50)", "300", "300", "12 (9–16)", "12.3 (9.0–15.5)",
    )  # fmt: skip
    assert list(summary_rows(found))[2] == ("Q8", "145", "12.3 (9.0–15.5)", "98.5 ± 0.4", "98.0 (korean)", "300")


def test_everything_fits_120_columns() -> None:
    found = result(**{"a-model-with-a-very-long-name-Q4_K_M": (145, 0.99, 0.98), "Q4": (90, 0.9, 0.9)})
    found["advice"] = advice(found)
    text = report(found)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" in text
    assert "3 of english, 4 of korean" in text
    assert "2 threads" in method(found)
