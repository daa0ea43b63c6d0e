"""The routes of other APIs are described by what their translations check."""

from __future__ import annotations

from xgen_proxy.api.description.translated import OPERATIONS, responses_request
from xgen_proxy.translation.responses.request import EFFORTS


def test_efforts_are_those_of_the_translation() -> None:
    assert set(EFFORTS) <= set(str(responses_request()["properties"]["reasoning"]).split("'"))


def test_what_is_dropped_is_told() -> None:
    [made] = [each for each in OPERATIONS if each.id == "createResponse"]
    assert "X-Dropped" in made.answers[200].headers
