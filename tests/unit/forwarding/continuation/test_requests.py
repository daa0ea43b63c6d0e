from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.chunks import HI, LLAMA_CPP_PYTHON, LLAMA_SERVER, OPENAI, VLLM, make_request
from tests.support.images import about, image
from tests.support.requests import make_call
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.forwarding.continuation.requests import (
    can_take_over,
    continuing_requests,
    limits_to_try,
    may_repeat,
    usage_request,
    why_not_resumable,
)
from xgen_proxy.forwarding.continuation.sent import SentPrefix

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
JSON: dict[str, Any] = {"response_format": {"type": "json_object"}}
FLAGS: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}


def sent(text: str = "", reasoning: str = "") -> SentPrefix:
    return SentPrefix({"id": "chatcmpl-1"}, text, 1, None, False, reasoning)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"messages": about(image())}, None),
        (
            {"messages": about({"type": "input_audio", "input_audio": {"data": "UklGRgAAAABXQVZF", "format": "wav"}})},
            None,
        ),
        ({"tools": [TOOL]}, None),
        ({"tools": [TOOL], "tool_choice": "required"}, None),
        (JSON, None),
        ({"logprobs": True, "n": 2}, "logprobs, n cannot be resumed"),
        ({"guided_json": {"type": "object"}}, None),
        ({"return_token_ids": True}, "return_token_ids cannot be resumed"),
        ({"return_token_ids": False, "prompt_logprobs": None}, None),
        ({"continuation": "none"}, "opted out"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "the client's own words"),
        ({"messages": [{"role": "assistant", "content": "I"}], "continue_final_message": True}, "own words"),
        ({"messages": [{"role": "assistant", "content": "I"}], **FLAGS}, None),
        ({"messages": [{"role": "assistant", "content": "I", "tool_calls": []}], **FLAGS}, "own words"),
        (FLAGS, "how the prompt ends"),
        ({"continue_final_message": False}, "how the prompt ends"),
        ({"stop": ["END"], "include_stop_str_in_output": True}, "half a stop string"),
        ({"stop": ["END"]}, None),
        ({"include_stop_str_in_output": True}, None),
    ],
)
def test_why_not_resumable(fields: dict[str, Any], reason: str | None) -> None:
    call = make_call(**fields)
    found = why_not_resumable(call.features, call.body)
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")


def test_a_completion_is_resumed_by_its_prompt() -> None:
    request = make_request("completions", prompt=["One"], min_tokens=5, max_tokens=9)
    [resumed] = continuing_requests(LLAMA_SERVER, request, sent(" two "), 6, None)
    assert resumed.body == {"model": "m", "prompt": "One two", "min_tokens": 0, "max_tokens": 3}
    assert (resumed.raw, resumed.features.max_tokens) == (None, 3)
    assert request.body["prompt"] == ["One"], "the client's body is unchanged"


def test_a_chat_without_text_is_asked_again() -> None:
    request = make_request(max_completion_tokens=9)
    assert continuing_requests(LLAMA_SERVER, request, sent(), 0, None) == ()
    assert may_repeat(request.features, sent())
    assert continuing_requests(LLAMA_SERVER, request, sent(" \n"), 0, None) == (), "white space is no text"
    assert may_repeat(request.features, sent(" \n"))


def test_the_tools_stay_in_the_request_that_continues_the_text_before_a_call() -> None:
    resumed, _ = continuing_requests(VLLM, make_request(tools=[TOOL]), sent("I call"), 0, None)
    assert resumed.body["tools"] == [TOOL]
    assert resumed.body["messages"] == [*HI, {"role": "assistant", "content": "I call"}]


@pytest.mark.parametrize("field", ["guided_json", "guided_choice", "guided_regex", "guided_grammar"])
def test_vllms_older_fields_constrain_the_answer_too(field: str) -> None:
    fields: dict[str, Any] = {field: "a"}
    request = make_request(**fields)
    assert continuing_requests(VLLM, request, sent("{"), 0, None) == (), "its grammar begins with the first new token"
    assert may_repeat(request.features, sent("{"))


def test_a_forced_call_does_not_go_on_as_a_text() -> None:
    request = make_request(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}})
    template = ChatTemplate("{{ messages }}")
    assert not can_take_over(LLAMA_CPP_PYTHON, request.features, sent("I call"), template)
    assert can_take_over(LLAMA_CPP_PYTHON, request.features, sent(), template)


@pytest.mark.parametrize(("dialect", "goes_on"), [(LLAMA_SERVER, True), (VLLM, False), (OPENAI, False)])
def test_constrained_text_is_continued_where_the_grammar_reads_it(dialect: Dialect, goes_on: bool) -> None:
    request = make_request(**JSON)
    assert bool(continuing_requests(dialect, request, sent("{"), 0, None)) == goes_on
    assert may_repeat(request.features, sent("{")), "else it must come again"
    assert can_take_over(dialect, request.features, sent("{"), None)


def test_a_constrained_completion_is_not_continued() -> None:
    """Without a chat template, llama.cpp's grammar begins with the first new token."""
    request = make_request("completions", **JSON)
    assert continuing_requests(LLAMA_SERVER, request, sent("{"), 0, None) == ()


def test_constrained_output_may_still_be_reasoned_about() -> None:
    """The grammar begins after the reasoning."""
    assert len(continuing_requests(VLLM, make_request(**JSON), sent(reasoning="hm"), 0, None)) == 1


def test_reasoning_is_continued_by_its_engine() -> None:
    [resumed] = continuing_requests(LLAMA_SERVER, make_request(), sent(reasoning="I think "), 0, None)
    message = {"role": "assistant", "content": "", "reasoning_content": "I think"}
    assert resumed.body == {"model": "m", "messages": [*HI, message], **FLAGS}
    [resumed] = continuing_requests(LLAMA_SERVER, make_request(), sent("Yes ", "I think "), 0, None)
    assert resumed.body["messages"][-1] == {"role": "assistant", "content": "Yes", "reasoning_content": "I think "}
    [resumed] = continuing_requests(VLLM, make_request(), sent(reasoning="\nI think"), 0, None)
    assert resumed.body["messages"][-1] == {"role": "assistant", "content": "<think>\nI think"}
    first, second = continuing_requests(VLLM, make_request(), sent("\n\nYes", "\nI think\n"), 0, None)
    assert first.body["messages"][-1] == {
        "role": "assistant", "content": "\n\nYes", "reasoning": "\nI think\n",
    }  # fmt: skip
    assert second.body["messages"][-1] == {"role": "assistant", "content": "<think>\nI think\n</think>\n\nYes"}


def test_an_engine_without_reasoning_does_not_take_over_reasoning() -> None:
    features = make_request().features
    assert not can_take_over(LLAMA_CPP_PYTHON, features, sent(reasoning="hm"), None)
    assert can_take_over(LLAMA_CPP_PYTHON, features, sent(), None), "nothing was shown"
    assert not can_take_over(LLAMA_CPP_PYTHON, features, sent("Yes"), None), "it has no template"
    assert not can_take_over(OPENAI, features, sent("Yes"), None)


PROMPT = make_request().features.prompt_tokens  # an estimate


@pytest.mark.parametrize(
    ("max_tokens", "context", "spent", "limits"),
    [
        (None, 1000, 400, [None]),
        (900, None, 400, [500]),
        (900, 2000, 400, [500]),
        (900, 1000, 400, [500]),
        (900, 900, 400, [500, 900 - PROMPT * 3 // 2 - 400 - 64]),
        (9000, 1000, 400, [1000 - PROMPT * 3 // 2 - 400 - 64]),  # beyond the context: the client does not mean it
        (9000, 1000, 990, [1]),
        (900, 1000, 900, [1]),
    ],
)
def test_a_limit_that_may_not_fit_is_followed_by_one_that_does(
    max_tokens: int | None, context: int | None, spent: int, limits: list[int | None]
) -> None:
    assert limits_to_try(VLLM, make_request(max_tokens=max_tokens, context=context), spent) == limits


def test_an_engine_that_takes_any_limit_gets_what_is_left() -> None:
    assert limits_to_try(LLAMA_SERVER, make_request(max_tokens=32_000, context=1000), 990) == [31_010]


def test_a_long_prompt_leaves_room_for_the_rest_of_an_answer() -> None:
    """As of an agent, whose max_tokens says nothing."""
    request = make_request(max_tokens=32_000, context=32_768)
    request = replace(request, features=replace(request.features, prompt_tokens=22_000, max_tokens_believed=False))
    assert limits_to_try(VLLM, request, 500) == [(32_768 - 500 - 22_000) * 3 // 4 - 64]


def test_the_engine_gets_the_limit_as_it_is() -> None:
    """A rule limits a max_tokens that may not fit beside the prompt; here it has been done."""
    request = make_request(max_tokens=900, context=900)
    asked = continuing_requests(VLLM, request, sent("a"), 400, None)
    limits = limits_to_try(VLLM, request, 400)
    assert len(limits) == 2
    assert list(dict.fromkeys(VLLM.prepared(each)["max_tokens"] for each in asked)) == limits


@pytest.mark.parametrize(("spent", "least"), [(10, 190), (150, 50), (250, 0)])
def test_the_least_number_of_tokens_never_exceeds_the_most(spent: int, least: int) -> None:
    """vLLM refuses such a request."""
    first, *_ = continuing_requests(VLLM, make_request(min_tokens=200, max_tokens=200), sent("a"), spent, None)
    assert first.body["min_tokens"] == min(least, first.body["max_tokens"])
    assert "min_tokens" not in usage_request(make_request(min_tokens=200)).body


def test_a_budget_of_reasoning_ends_with_the_reasoning() -> None:
    """llama-server counts anew, and would write the closing tag into the text."""
    budgets: dict[str, Any] = {"thinking_budget_tokens": 9, "thinking_token_budget": 9}
    request = make_request(**budgets)
    for dialect in (LLAMA_SERVER, VLLM):
        first, *_ = continuing_requests(dialect, request, sent("Yes", "hm"), 0, None)
        assert budgets.keys().isdisjoint(first.body)
        first, *_ = continuing_requests(dialect, request, sent(reasoning="hm"), 0, None)
        assert budgets.keys() <= first.body.keys()


def test_an_answer_goes_on_after_the_clients_own_words_and_what_was_sent() -> None:
    """As Anthropic's API continues a final message of the assistant."""
    request = make_request(messages=[*HI, {"role": "assistant", "content": "Once"}], **FLAGS)
    [resumed] = continuing_requests(VLLM, request, sent(" upon"), 5, None)
    assert resumed.body["messages"] == [*HI, {"role": "assistant", "content": "Once upon"}]
    assert {name: resumed.body[name] for name in FLAGS} == FLAGS
    assert continuing_requests(VLLM, request, sent(" upon", "hm"), 5, None) == (), "reasoning within a text"


def test_the_usage_of_the_prompt_costs_one_token() -> None:
    asked = usage_request(make_request(max_completion_tokens=9, tools=[TOOL]))
    assert (asked.body["max_tokens"], asked.body["tools"], asked.raw) == (1, [TOOL], None)
