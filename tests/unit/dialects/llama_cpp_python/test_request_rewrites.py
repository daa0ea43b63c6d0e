"""Cases that the table of rules in test_request_rules.py does not show."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chunks import TOOLS, make_request
from xgen_proxy.dialects.llama_cpp_python import request_rewrites as rewrite
from xgen_proxy.errors import BadRequestError

UNCHANGED = [
    rewrite.drop_nulls,
    rewrite.one_choice,
    rewrite.json_object_with_schema,
    rewrite.checked_functions,
    rewrite.drop_unforced_tools,
    rewrite.fill_top_logprobs,
    rewrite.positive_top_k,
]


@pytest.mark.parametrize("apply", UNCHANGED)
def test_a_body_without_the_field_is_returned_as_it_is(apply: Any) -> None:
    request = make_request()
    assert apply(request.body, request) is request.body


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": {}},
        {"tools": ["f"]},
        {"tools": [{"type": "function"}]},
        {**TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"functions": [], "function_call": {"name": "f"}},
    ],
)
def test_malformed_tools_are_refused(fields: dict[str, Any]) -> None:
    request = make_request()
    with pytest.raises(BadRequestError) as caught:
        rewrite.checked_functions({**request.body, **fields}, request)
    assert caught.value.param in {"tools", "tool_choice", "functions", "function_call"}


def test_content_parts_are_joined_and_null_content_is_empty() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    messages = [{"role": "developer", "content": parts, "name": None}, {"role": "assistant", "content": None}]
    request = make_request(messages=messages)
    plain = rewrite.plain_messages(request.body, request)["messages"]
    assert plain == [{"role": "system", "content": "a\nb"}, {"role": "assistant", "content": ""}]
