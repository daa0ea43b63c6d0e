"""A request to /v1/responses as a chat completion that asks for the same.

Fields that this API does not have, such as an engine's own sampling parameters and this proxy's hints, stay.
"""

from __future__ import annotations

from typing import Any

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import Json
from xgen_proxy.request.fields import INT32_MAX, MAX_LOGPROBS, get_field, whole_number
from xgen_proxy.translation.responses.items import read_messages
from xgen_proxy.translation.responses.tools import Tools, read_tools
from xgen_proxy.values import frozen

LOGPROBS = "message.output_text.logprobs"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SAME = ("model", "stream", "temperature", "top_p", "prompt_cache_key", "user")
NO_EFFECT = frozenset({
    "store", "include", "metadata", "client_metadata", "safety_identifier", "prompt_cache_retention",
    "prompt_cache_options", "prompt_cache_diagnostics", "stream_options",
})  # fmt: skip
READ = frozenset({
    *SAME, "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning",
    "max_output_tokens", "top_logprobs", "previous_response_id", "conversation", "background", "prompt",
})  # fmt: skip
# Fields that would change the answer if they were heeded, and their values that ask for nothing.
NOT_HEEDED: dict[str, tuple[Any, ...]] = {
    "truncation": (None, "disabled"),
    "service_tier": (None, "auto", "default"),
    "max_tool_calls": (None,),
    "context_management": (None, []),
    "moderation": (None,),
    "store": (None, False),
    "access_programs": (None,),
    "image": (None,),
}
# A chat's own fields, which the translation writes or which ask for more than one answer.
CHATS = frozenset({
    "messages", "response_format", "functions", "function_call", "n", "n_cmpl", "best_of", "logprobs", "max_tokens",
    "max_completion_tokens", "n_predict", "reasoning_effort", "modalities", "audio",
})  # fmt: skip

STATE = {
    "previous_response_id": "send the whole conversation as input",
    "conversation": "send the whole conversation as input",
    "prompt": "send the prompt's text as instructions and input",
}


@frozen
class ChatRequest:
    """`body` is the chat completion. `dropped` names what it does not ask for."""

    body: Json
    tools: Tools
    dropped: tuple[str, ...]


def read_request(body: Json) -> ChatRequest:
    """Raises BadRequestError, which names the field and what it should be."""
    _refuse_state(body)
    messages, dropped_items = read_messages(body)
    tools = read_tools(body)
    chat: Json = {name: body[name] for name in SAME if body.get(name) is not None}
    chat["messages"] = messages
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    if (most := whole_number(body, "max_output_tokens", 1, INT32_MAX)) is not None:
        chat["max_completion_tokens"] = most
    if tools.offered:
        chat["tools"] = list(tools.offered)
        chat |= {"tool_choice": tools.choice} if tools.choice is not None else {}
        parallel = get_field(body, "parallel_tool_calls", bool)
        chat |= {"parallel_tool_calls": parallel} if parallel is not None else {}
    text = get_field(body, "text", dict) or {}
    if response_format := _response_format(get_field(text, "format", dict, "text.format")):
        chat["response_format"] = response_format
    if effort := _effort(get_field(body, "reasoning", dict) or {}):
        chat["reasoning_effort"] = effort
    chat |= _logprobs(body)
    known = READ | NO_EFFECT | NOT_HEEDED.keys() | CHATS
    chat |= {name: value for name, value in body.items() if name not in known}
    return ChatRequest(chat, tools, (*tools.dropped, *dropped_items, *_not_heeded(body, text)))


def _refuse_state(body: Json) -> None:
    for field, instead in STATE.items():
        if body.get(field) is not None:
            raise BadRequestError(
                f"{field} cannot be used here, because this proxy keeps nothing; {instead}", param=field
            )
    # n8n sends `store: true` with every request and never asks for what was stored. The answer says `store: false`.
    get_field(body, "store", bool)
    if get_field(body, "background", bool):
        raise BadRequestError(
            "background must be false or absent, because this proxy keeps no responses; wait for the answer, or send"
            " stream: true",
            param="background",
        )


def _not_heeded(body: Json, text: Json) -> list[str]:
    found = [field for field, nothing in NOT_HEEDED.items() if body.get(field) not in nothing]
    if text.get("verbosity") not in (None, "medium"):
        found.append("text.verbosity")
    return found + sorted(name for name in CHATS if body.get(name) is not None)


def _response_format(form: Json | None) -> Json | None:
    kind = (form or {}).get("type")
    if form is None or kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise BadRequestError(
            f"text.format.type must be text, json_object or json_schema, not {quoted(kind)}", param="text.format.type"
        )
    schema = get_field(form, "schema", dict, "text.format.schema")
    if schema is None:
        raise BadRequestError("text.format.schema is missing", param="text.format.schema")
    wrapper = {name: form[name] for name in ("description", "strict") if form.get(name) is not None}
    name = get_field(form, "name", str, "text.format.name") or "response"
    return {"type": "json_schema", "json_schema": {"name": name, **wrapper, "schema": schema}}


def _effort(reasoning: Json) -> str | None:
    effort: str | None = get_field(reasoning, "effort", str, "reasoning.effort")
    if effort is not None and effort not in EFFORTS:
        raise BadRequestError(f"reasoning.effort must be one of {', '.join(EFFORTS)}", param="reasoning.effort")
    return effort


def _logprobs(body: Json) -> Json:
    include = get_field(body, "include", list) or []
    most = whole_number(body, "top_logprobs", 0, MAX_LOGPROBS)
    if LOGPROBS not in include and not most:
        return {}
    return {"logprobs": True, **({"top_logprobs": most} if most else {})}
