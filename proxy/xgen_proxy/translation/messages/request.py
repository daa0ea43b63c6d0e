"""A request to /v1/messages or /v1/messages/count_tokens as a chat completion."""

from __future__ import annotations

import re
from typing import Any

import orjson

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import HINTS, Json
from xgen_proxy.request.fields import INT32_MAX, NAME_LENGTH, get_field, whole_number
from xgen_proxy.translation.messages.blocks import Dropped
from xgen_proxy.translation.messages.conversation import chat_messages, prefill_flags
from xgen_proxy.translation.messages.tools import tool_fields

COPIED = ("model", "temperature", "top_p", "top_k", *HINTS)
TRANSLATED = frozenset({
    *COPIED, "messages", "system", "max_tokens", "stop_sequences", "stream", "tools", "tool_choice", "thinking",
    "output_config", "output_format", "metadata",
})  # fmt: skip
# What an engine does anyway, or what only Anthropic's accounts have. Every other field is named in X-Dropped.
SILENT = frozenset({
    "cache_control", "betas", "service_tier", "inference_geo", "speed", "diagnostics", "user_profile_id",
    "workspace_id", "anthropic_version",
})  # fmt: skip
# The engines have three efforts. vLLM refuses others for some models.
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
THINKING = ("enabled", "adaptive", "between_tools", "disabled")
SESSION = re.compile(r"_session_([\w-]{1,128})\Z")
MAX_SESSION = 128  # characters


def to_chat(body: Json, dropped: Dropped, *, strip_attribution: bool, counts: bool = False) -> Json:
    """The chat that asks for the same. `dropped` collects the names of what it cannot ask for.

    `counts`: of count_tokens, which has no max_tokens. Raises BadRequestError, which names the field of this API.
    """
    messages = get_field(body, "messages", list)
    if not messages:
        raise BadRequestError("messages is missing or empty; send at least one message", param="messages")
    chat = {field: body[field] for field in COPIED if body.get(field) is not None}
    chat["messages"] = chat_messages(body.get("system"), messages, dropped, strip_attribution=strip_attribution)
    if not chat["messages"]:
        raise BadRequestError("messages have no content", param="messages")
    chat |= prefill_flags(chat["messages"][-1])
    chat |= tool_fields(body, dropped)
    chat |= _output(body)
    chat |= _thinking(body, dropped)
    if not counts:
        chat |= _limits(body)
    if session := _session(body):
        chat["prompt_cache_key"] = session  # not session_id, which would win over the header of that name
    for field in body:
        if field not in TRANSLATED and field not in SILENT:
            dropped[field] = None
    return chat


def _limits(body: Json) -> Json:
    limit = whole_number(body, "max_tokens", 0, INT32_MAX)
    if limit is None:
        raise BadRequestError("max_tokens is missing; send the most tokens to generate", param="max_tokens")
    fields: Json = {"max_tokens": limit or 1}  # 0 only fills Anthropic's cache; one token fills the engine's
    stops = get_field(body, "stop_sequences", list)
    if stops:
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise BadRequestError("stop_sequences must be an array of non-empty strings", param="stop_sequences")
        fields["stop"] = stops
    if get_field(body, "stream", bool):
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return fields


def _output(body: Json) -> Json:
    """`output_format` is the name that the beta had."""
    config = get_field(body, "output_config", dict) or {}
    fields: Json = {}
    effort = get_field(config, "effort", str, "output_config.effort")
    if effort is not None:
        if effort not in EFFORTS:
            message = f"output_config.effort must be one of {', '.join(EFFORTS)}"
            raise BadRequestError(message, param="output_config.effort")
        fields["reasoning_effort"] = EFFORTS[effort]
    name = "output_config.format" if config.get("format") is not None else "output_format"
    wanted = get_field(config, "format", dict, name) or get_field(body, "output_format", dict)
    if wanted is not None:
        schema = get_field(wanted, "schema", dict, f"{name}.schema")
        if wanted.get("type") != "json_schema" or schema is None:
            raise BadRequestError(f"{name} must be {{type: json_schema, schema: {{…}}}}", param=name)
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    return fields


def _thinking(body: Json, dropped: Dropped) -> Json:
    """The template's switch for `thinking`. Models that can think do so by default, and templates without the switch
    ignore it. A budget is dropped, because no field for it works on every engine."""
    thinking = get_field(body, "thinking", dict)
    if thinking is None:
        return {}
    if thinking.get("type") not in THINKING:
        raise BadRequestError(f"thinking.type must be one of {', '.join(THINKING)}", param="thinking.type")
    if thinking.get("budget_tokens") is not None:
        dropped["thinking.budget_tokens"] = None
    if thinking.get("display") == "omitted":
        dropped["thinking.display"] = None
    return {"chat_template_kwargs": {"enable_thinking": False}} if thinking["type"] == "disabled" else {}


def _session(body: Json) -> str | None:
    """Claude Code's conversation: `user_…_account_…_session_ID`, or since 2.1 a JSON object with `session_id`."""
    metadata = get_field(body, "metadata", dict) or {}
    user = get_field(metadata, "user_id", str, "metadata.user_id") or ""
    if len(user) > NAME_LENGTH:  # Anthropic's limit too
        return None
    if found := SESSION.search(user):
        return found[1]
    if not user.startswith("{"):
        return None
    try:
        session: Any = orjson.loads(user).get("session_id")
    except orjson.JSONDecodeError:
        return None
    return session[:MAX_SESSION] if isinstance(session, str) else None
