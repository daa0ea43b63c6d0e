"""Requests whose answers have a tool call, constrained output or reasoning, and what is wrong with an answer to one.

Real engines answer them with SmolLM2, which can do none of this unaided: `tool_choice: required` and a schema constrain
it, and the template `blocks.jinja` opens its reasoning, which ends when the budget is spent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.proxied_backend import NEVER_ENDING, chat

Json = dict[str, Any]
BLOCKS_TEMPLATE = Path(__file__).with_name("blocks.jinja")

WEATHER: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
# vLLM holds only a strict function to its schema.
FUNCTION: Json = {"name": "weather", "description": "The weather.", "parameters": WEATHER, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
QUESTION = "What is the weather in Paris for 3 days?"
NOT_THINKING: Json = {"chat_template_kwargs": {"enable_thinking": False}}
CALLING: Json = {"max_tokens": 90, "parallel_tool_calls": False, **NOT_THINKING}

KINDS: dict[str, Json] = {
    "tool call": chat(QUESTION, tools=[TOOL], tool_choice="required", **CALLING),
    "JSON schema": chat(
        "The weather in Paris for 3 days, as JSON.",
        response_format={"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}},
        max_tokens=90,
        **NOT_THINKING,
    ),
    # vLLM's and llama-server's names for the same limit
    "reasoning": chat(
        "Why is the sky blue?",
        max_tokens=20,
        thinking_token_budget=10,
        thinking_budget_tokens=10,
        **NEVER_ENDING,
    ),
}


def read(stream: str) -> Json:
    """{reasoning, content, calls, finishes} of a stream. Raises ValueError if it is broken."""
    events = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise ValueError(f"no [DONE]: {stream[-400:]}")
    chunks = [json.loads(event) for event in events[:-1]]
    if len({chunk["id"] for chunk in chunks}) != 1:
        raise ValueError("two streams in one")
    answer: Json = {"reasoning": "", "content": "", "calls": {}, "finishes": [], "roles": 0}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice["delta"]
        answer["roles"] += "role" in delta
        for name in ("reasoning", "content"):
            answer[name] += delta.get(name) or ""
        for call in delta.get("tool_calls") or ():
            said = answer["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
            for name in said:
                said[name] += call["function"].get(name) or ""
        answer["finishes"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return answer


def wrong(kind: str, stream: str) -> str:
    """What is wrong with an answer of this kind; empty if it is valid."""
    try:
        answer = read(stream)
        if len(answer["finishes"]) != 1 or answer["roles"] != 1:
            return f"finish_reasons {answer['finishes']}, {answer['roles']} roles"
        if kind == "reasoning":
            return wrong_reasoning(answer)
        if kind == "tool call":
            call = answer["calls"][0]  # llama-server lets the model go on to a second, which max_tokens may cut
            if call["name"] != "weather":
                return f"calls {call['name']}"
            return wrong_weather(json.loads(call["arguments"]))
        return wrong_weather(json.loads(answer["content"]))
    except (ValueError, LookupError, TypeError) as error:
        return f"{error!r}"


def wrong_reasoning(answer: Json) -> str:
    if not answer["reasoning"].strip() or not answer["content"].strip():
        return "no reasoning or no text"
    return "a tag in the answer" if "</think>" in answer["content"] + answer["reasoning"] else ""


def wrong_weather(found: Json) -> str:
    if set(found) != set(WEATHER["required"]) or found["unit"] not in ("celsius", "fahrenheit"):
        return f"not as the schema has it: {found}"
    return "" if isinstance(found["days"], int) and isinstance(found["city"], str) else f"other types: {found}"
