"""Whole answers as response objects."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai.types.responses import Response

from xgen_proxy.translation.chat import Answer, Finish, ToolCall, Usage
from xgen_proxy.translation.responses.response import ResponseHead, repeated, whole_response
from xgen_proxy.translation.responses.tools import read_tools

TOOLS = [{"type": "function", "name": "f", "parameters": {}, "strict": False}, {"type": "custom", "name": "patch"}]
USAGE = Usage(9, 4, 8, 3)


def respond(answer: Answer, **request: Any) -> dict[str, Any]:
    """The answer, which must be what the SDK's strictest reading accepts."""
    sent = {"model": "m", "input": "Hi", **request}
    data = whole_response(ResponseHead(sent, "m"), read_tools(sent), answer)
    Response.model_validate_json(data)
    return dict(orjson.loads(data))


def answer(text: str = "", reasoning: str = "", *calls: ToolCall, finish: str = "stop") -> Answer:
    return Answer(text, reasoning, calls, Finish(finish), USAGE)


def test_a_text() -> None:
    response = respond(answer("Hello"), temperature=0.5, metadata={"a": "b"})
    key = response["id"].removeprefix("resp_")
    assert response["status"] == "completed"
    assert response["completed_at"] >= response["created_at"] > 0
    assert (response["model"], response["store"], response["temperature"]) == ("m", False, 0.5)
    assert response["metadata"] == {"a": "b"}
    assert response["output"] == [{
        "id": f"msg_{key}_0", "type": "message", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }]  # fmt: skip
    assert response["usage"] == {
        "input_tokens": 9, "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0},
        "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 13,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "kinds"),
    [
        (answer("Hi", "Hm"), ["reasoning", "message"]),
        (answer("", "Hm"), ["reasoning"]),
        (answer(""), ["message"]),
        (answer("", "", ToolCall("a", "f", "{}")), ["function_call"]),
        (answer("\n\n", "Hm", ToolCall("a", "f", "{}")), ["reasoning", "function_call"]),
        (answer("So", "", ToolCall("a", "f", ""), ToolCall("b", "patch", '{"input":"x"}')),
         ["message", "function_call", "custom_tool_call"]),
    ],
)  # fmt: skip
def test_items(whole: Answer, kinds: list[str]) -> None:
    response = respond(whole, tools=TOOLS)
    assert [item["type"] for item in response["output"]] == kinds
    assert len({item["id"] for item in response["output"]}) == len(kinds)
    assert response["tools"] == TOOLS


def test_calls_are_in_the_clients_words() -> None:
    response = respond(answer("", "", ToolCall("a", "f", ""), ToolCall("", "patch", '{"input":"x"}')), tools=TOOLS)
    called, patched = response["output"]
    assert (called["call_id"], called["name"], called["arguments"]) == ("a", "f", "{}")
    assert (patched["name"], patched["input"]) == ("patch", "x")
    assert patched["call_id"].startswith("call_")


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_answer_that_was_cut(finish: str, reason: str) -> None:
    response = respond(answer("Hel", finish=finish))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": reason})
    assert response["output"][0]["status"] == "incomplete"
    assert response["completed_at"] is None


LONG = "x" * 70_000
LONG_FIELDS = {
    "instructions": LONG, "metadata": {"a": LONG}, "text": {"format": {"type": LONG}}, "user": LONG, "tools": [LONG],
    "tool_choice": {"type": LONG}, "reasoning": {"summary": LONG}, "safety_identifier": LONG, "prompt_cache_key": LONG,
}  # fmt: skip


@pytest.mark.parametrize("field", LONG_FIELDS)
def test_long_fields_are_not_repeated(field: str) -> None:
    kept = repeated({"input": "Hi", "temperature": 0.5, field: LONG_FIELDS[field]})
    assert kept == {"temperature": 0.5}
    assert len(orjson.dumps(ResponseHead(kept, "m").response("in_progress"))) < 2_000


def test_the_request_is_repeated() -> None:
    text = {"format": {"type": "json_object"}, "verbosity": "low"}
    response = respond(answer("{}"), text=text, reasoning={"effort": "low"}, tools=TOOLS, tool_choice="required",
                       instructions="Be brief.", max_output_tokens=50, parallel_tool_calls=False)  # fmt: skip
    assert response["text"] == text
    assert response["reasoning"] == {"effort": "low", "summary": None}
    assert (response["tool_choice"], response["parallel_tool_calls"]) == ("required", False)
    assert (response["instructions"], response["max_output_tokens"]) == ("Be brief.", 50)
    assert respond(answer("x"))["text"] == {"format": {"type": "text"}}
