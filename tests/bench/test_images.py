"""bench/images.py fails when anything that it claims does not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from bench.images import PATHS, PICTURES, faults, kill_table, table, usages_in

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def found() -> dict[str, Any]:
    """A result in which everything holds."""
    asked = [
        {"api": api, "stream": stream, "images": images, "status": 200, "backend": "seeing", "prompt_tokens": tokens}
        for api in PATHS for stream in (False, True) for images, tokens in zip(PICTURES, (16, 36, 56), strict=True)
    ]  # fmt: skip
    return {
        "reads_images": {"seeing": True, "second": True, "blind": False},
        "asked": asked,
        "another_image_another_token": True,
        "killed": {"streams": 2, "cut": 2, "resumed": 2, "complete": 2, "wrong": [], "stall_s": [0.2, 0.1]},
    }


def test_a_good_result(found: dict[str, Any]) -> None:
    assert not list(faults(found))
    assert list(table(found))[1] == ("/v1/chat/completions", "seeing", "16", "36", "56")
    assert list(kill_table(found))[1] == ("2", "2", "2", "2", "0.15", "0.20")


@pytest.mark.parametrize("change", [
    lambda found: found["reads_images"].update(blind=True),
    lambda found: found["reads_images"].update(second=False),
    lambda found: found["asked"][1].update(backend="blind"),
    lambda found: found["asked"][1].update(status=500),
    lambda found: found["asked"][0].update(prompt_tokens=0),
    lambda found: found["asked"][1].update(prompt_tokens=16),
    lambda found: found["asked"][-1].update(prompt_tokens=36),
    lambda found: found.update(another_image_another_token=False),
    lambda found: found["killed"].update(cut=1),
    lambda found: found["killed"].update(resumed=1),
    lambda found: found["killed"].update(complete=1),
])  # fmt: skip
def test_a_bad_result(found: dict[str, Any], change: Change) -> None:
    changed = copy.deepcopy(found)
    change(changed)
    assert len(list(faults(changed))) == 1


def test_usage_is_found_wherever_an_api_puts_it() -> None:
    assert list(usages_in([{"response": {"usage": None}}, {"response": {"usage": {"input_tokens": 3}}}])) == [
        {"input_tokens": 3}
    ]
