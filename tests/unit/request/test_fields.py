from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.fields import LISTS, NAME_LENGTH, check_choices, check_fields, get_field

LONG = "x" * 100_000


def refused(body: dict[str, Any]) -> BadRequestError:
    with pytest.raises(BadRequestError) as caught:
        check_fields(body)
    assert len(caught.value.message) < 200
    assert len(caught.value.param or "") <= NAME_LENGTH
    return caught.value


@pytest.mark.parametrize("field", LISTS)
def test_lists_are_limited_in_number_and_length(field: str) -> None:
    most, longest = LISTS[field]
    texts = [f"{n}" for n in range(most + 1)]
    fits, too_many, too_long = texts[:most], texts, ["x" * (longest + 1)]
    if field == "logit_bias":
        fits, too_many, too_long = (dict.fromkeys(each, 1) for each in (fits, too_many, too_long))  # type: ignore[assignment]
    check_fields({field: fits})
    assert f"{field} has {most + 1} entries; the limit is {most}" in refused({field: too_many}).message
    assert f"the limit is {longest}" in refused({field: too_long}).message


def test_a_single_stop_string_is_limited_too() -> None:
    check_fields({"stop": "x" * 256})
    assert refused({"stop": "x" * 257}).param == "stop"


@pytest.mark.parametrize("field", ["model", "user", "session_id", "urgency", "task_type", "reasoning_format", "new"])
def test_a_text_that_is_no_prompt_is_a_name(field: str) -> None:
    check_fields({field: "x" * NAME_LENGTH})
    assert f"{field}' has 100000 characters; the limit is {NAME_LENGTH}" in refused({field: LONG}).message


def test_prompts_and_grammars_are_no_names() -> None:
    check_fields({"prompt": LONG, "input": LONG, "suffix": LONG, "chat_template": LONG})


def test_a_field_with_a_long_name_is_not_repeated() -> None:
    refused({LONG: LONG})


@pytest.mark.parametrize("field", ["tools", "functions"])
def test_names_of_functions_are_limited(field: str) -> None:
    function = {"name": "f" * 257}
    assert refused({field: [{"function": function} if field == "tools" else function]}).param == field
    check_fields({field: [{"name": "f" * 256}, 5, {"function": 5}]})


@pytest.mark.parametrize("fields", [{"logprobs": -1}, {"logprobs": 21}, {"prompt_logprobs": -1}])
def test_alternatives_of_each_token_are_limited(fields: dict[str, Any]) -> None:
    refused(fields)


def test_logprobs_may_be_true_or_a_number() -> None:
    for value in (True, False, None, 0, 20):
        check_fields({"logprobs": value})


def test_a_field_is_read_with_its_type() -> None:
    assert get_field({"a": None}, "a", str) is None
    assert get_field({"a": "b"}, "a", str) == "b"
    with pytest.raises(BadRequestError, match=r"x\.a must be a string or an array, not true"):
        get_field({"a": True}, "a", (str, list), "x.a")


def test_choices_of_all_prompts_are_limited() -> None:
    check_choices({"n": 64}, 2)
    check_choices({"n": None}, 128)
    with pytest.raises(BadRequestError, match="130 choices"):
        check_choices({"n": 65}, 2)
