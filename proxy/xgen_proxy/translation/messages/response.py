"""A whole chat completion as a message."""

from __future__ import annotations

from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import Answer, Finish, ToolCall, Usage, tool_input

SIGNATURE = "xgen-proxy"  # clients send it back unread; only Anthropic's own models sign what they think
REASONS = {"length": "max_tokens", "content_filter": "refusal"}


def message_of(answer: Answer, request_id: str, model: str) -> Json:
    content: list[Json] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": SIGNATURE})
    if answer.text or not (answer.reasoning or answer.tool_calls):
        content.append({"type": "text", "text": answer.text})
    content += [_tool_use(call, f"toolu_{request_id}_{number}") for number, call in enumerate(answer.tool_calls)]
    reason, stop = stop_reason(answer.finish, called=bool(answer.tool_calls))
    return {
        "id": f"msg_{request_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": usage_of(answer.usage),
    }


def _tool_use(call: ToolCall, id: str) -> Json:
    """`id`: for a call that the engine gave none."""
    return {"type": "tool_use", "id": call.id or id, "name": call.name, "input": tool_input(call.arguments)}


def stop_reason(finish: Finish, *, called: bool) -> tuple[str, str | None]:
    """Returns (stop_reason, stop_sequence). `called`: the answer has a tool call. It decides, because vLLM finishes a
    forced call with "stop"."""
    if finish.reason in REASONS:
        return REASONS[finish.reason], None
    if called:
        return "tool_use", None
    return ("stop_sequence", finish.stop) if finish.stop is not None else ("end_turn", None)


def usage_of(usage: Usage) -> Json:
    """`input_tokens` are those that were not in the cache."""
    return {
        "input_tokens": max(usage.prompt - usage.cached, 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        **({"output_tokens_details": {"thinking_tokens": usage.reasoning}} if usage.reasoning else {}),
    }
