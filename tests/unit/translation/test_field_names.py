"""Errors about a chat's field name the client's."""

from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.translation.field_names import renamed

NAMES = {"response_format": "text.format", "messages": "input"}


@pytest.mark.parametrize(
    ("param", "message", "own", "words"),
    [
        ("messages", "messages is missing", "input", "input is missing"),
        ("messages", "there are 9 messages; the limit is 8", "input", "there are 9 messages; the limit is 8"),
        ("response_format", "the schema in response_format refers to itself", "text.format",
         "the schema in text.format refers to itself"),
        ("response_format", "response_formats", "text.format", "response_formats"),
        ("messages", None, "input", None),
        ("tools", "tools is wrong", "tools", "tools is wrong"),
        (None, "messages", None, "messages"),
        (["messages"], "messages", ["messages"], "messages"),
    ],
)  # fmt: skip
def test_the_clients_name(param: Any, message: Any, own: Any, words: Any) -> None:
    error = {"message": message, "param": param, "code": "c"}
    assert renamed(error, NAMES) == {"message": words, "param": own, "code": "c"}
