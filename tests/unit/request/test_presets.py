from __future__ import annotations

import pytest

from tests.support.builders import features
from xgen_proxy.request.presets import apply_preset

CREATIVE = {"temperature": 0.9, "top_p": 0.95, "top_k": 50}
BALANCED = {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
PRECISE = {"temperature": 0.3, "top_p": 0.8, "top_k": 20}
DETERMINISTIC = {"temperature": 0, "top_p": 1, "top_k": 1}


@pytest.mark.parametrize(
    ("task_type", "urgency", "expected"),
    [
        ("code_generation", "normal", PRECISE),
        ("code_generation", "high", PRECISE),
        ("creative_writing", "high", CREATIVE),
        (None, "high", DETERMINISTIC),
        (None, "normal", BALANCED),
        ("translation", "low", BALANCED),
        ("translation", "high", DETERMINISTIC),
    ],
)
def test_which_preset(task_type: str | None, urgency: str, expected: dict[str, float]) -> None:
    assert apply_preset({}, features(task_type=task_type, urgency=urgency, hinted=True)) == expected


def test_the_clients_own_values_stay() -> None:
    body = {"temperature": 1.5, "top_p": None}
    assert apply_preset(body, features(urgency="high", hinted=True)) == {"temperature": 1.5, "top_p": 1, "top_k": 1}


def test_without_a_hint_nothing_is_touched() -> None:
    body = {"model": "m"}
    assert apply_preset(body, features()) is body
    assert apply_preset(body, features(hinted=True, endpoint="embeddings")) is body
