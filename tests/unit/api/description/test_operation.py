"""Errors are described from errors.py."""

from __future__ import annotations

from xgen_proxy.api.description.operation import (
    ANY,
    BODY,
    JSON,
    KEY,
    MEANINGS,
    MODEL,
    Answer,
    Operation,
    codes_by_status,
    error_responses,
)


def test_every_status_of_an_error_has_a_meaning() -> None:
    assert set(MEANINGS) == {*codes_by_status(), 529}  # which is what 503 becomes in Anthropic's API
    assert set(error_responses()) == {*map(str, codes_by_status()), "4XX"}


def test_every_status_is_declared_by_some_operation() -> None:
    """405 is the answer to a method that no operation has."""
    assert {*ANY, *KEY, *BODY, *MODEL, 405, 529} == set(MEANINGS)


def test_codes_are_told_with_their_status() -> None:
    assert codes_by_status()[429] == ["queue_full"]
    assert "`response_too_large`" in error_responses()["502"]["description"]
    assert "`context_length_exceeded`" in error_responses()["400"]["description"]


def test_an_operation_as_openapi_has_it() -> None:
    found = Operation(
        "POST", "/x", "doX", "Models", "Do it", "It is done.", {200: Answer("Done.", {JSON: {}}, ("X-Replica",))},
        {"type": "object"}, ("X-Urgency",), (400, 200), needs_key=True, asks_a_model=True, example={"a": 1},
    ).described()  # fmt: skip
    assert found["requestBody"]["content"][JSON] == {"schema": {"type": "object"}, "example": {"a": 1}}
    assert found["parameters"] == [{"$ref": "#/components/parameters/X-Urgency"}]
    assert list(found["responses"]) == ["200", "400", "4XX"]
    assert set(found["responses"]["200"]["headers"]) == {"X-Request-Id", "X-Replica"}
    assert found["security"] == [{"bearer": []}, {"x-api-key": []}, {}]
