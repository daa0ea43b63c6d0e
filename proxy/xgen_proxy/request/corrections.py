"""Corrects what clients are known to send and engines refuse, where only one thing can be meant.

What a single engine needs changed is a request rule of its dialect.
"""

from __future__ import annotations

from typing import Any

from xgen_proxy.request.features import Json
from xgen_proxy.request.fields import RANGES

WHOLE = frozenset(name for name, (_, _, whole) in RANGES.items() if whole) | {
    "min_tokens", "n_predict", "n_cmpl", "logprobs", "repeat_last_n", "dry_penalty_last_n", "n_probs",
    "truncate_prompt_tokens", "mirostat_mode", "dimensions",
}  # fmt: skip
OWN_NAMES = {"n_predict": "max_tokens", "n_cmpl": "n"}  # llama.cpp's, which would go around the limits of OpenAI's
EXACT = 2**53  # a larger float is no exact number


def corrected(body: Json) -> Json:
    """Returns the same object if there is nothing to correct. Takes any JSON object, which is checked only later."""
    if float in map(type, body.values()):
        body = _whole_numbers(body)
    if not OWN_NAMES.keys().isdisjoint(body):
        body = _with_openais_names(body)
    if body.get("max_tokens") == -1:  # llama.cpp's word for no limit
        body = {name: value for name, value in body.items() if name != "max_tokens"}
    if ("tools" in body or "tool_choice" in body) and not body.get("tools"):
        body = _without_empty_tools(body)
    if isinstance(body.get("messages"), list):
        body = _with_tool_results(body)
    return body


def _whole_numbers(body: Json) -> Json:
    """100.0, as some languages write 100."""
    found = {
        name: int(value)
        for name in WHOLE.intersection(body)
        if type(value := body[name]) is float and value.is_integer() and abs(value) < EXACT
    }
    return {**body, **found} if found else body


def _with_openais_names(body: Json) -> Json:
    """OpenAI's own name wins where both are given."""
    kept = {name: value for name, value in body.items() if name not in OWN_NAMES}
    renamed = {OWN_NAMES[name]: body[name] for name in OWN_NAMES if name in body}
    return {**kept, **{name: value for name, value in renamed.items() if kept.get(name) is None}}


def _without_empty_tools(body: Json) -> Json:
    """vLLM refuses an empty list, and a tool_choice without tools."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    empty = {"tools"} if tools is None or tools == [] else set()
    if empty and (choice is None or choice in ("auto", "none")):
        empty.add("tool_choice")
    return {name: value for name, value in body.items() if name not in empty} if empty & body.keys() else body


def _with_tool_results(body: Json) -> Json:
    """A tool that returns nothing; a conversation could not go on without its result."""
    for message in body["messages"]:
        if isinstance(message, dict) and message.get("content") is None and message.get("role") == "tool":
            return {**body, "messages": [_with_result(each) for each in body["messages"]]}
    return body


def _with_result(message: Any) -> Any:
    if isinstance(message, dict) and message.get("content") is None and message.get("role") == "tool":
        return {**message, "content": ""}
    return message
