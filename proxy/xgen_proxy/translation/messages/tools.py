"""Tools and the choice among them."""

from __future__ import annotations

from typing import Any

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import Json
from xgen_proxy.request.fields import get_field
from xgen_proxy.translation.messages.blocks import Dropped, get_text

COPIED = ("description", "strict")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def tool_fields(body: Json, dropped: Dropped) -> Json:
    """The fields tools, tool_choice and parallel_tool_calls of the chat. Raises BadRequestError.

    Tools with a type of their own, such as web_search_20250305, run at Anthropic or are known to its models only.
    """
    tools = []
    for number, tool in enumerate(get_field(body, "tools", list) or ()):
        where = f"tools.{number}"
        if not isinstance(tool, dict):
            raise BadRequestError(f"{where} must be an object with name and input_schema", param=where)
        kind = get_field(tool, "type", str, f"{where}.type")
        if kind not in (None, "custom"):
            dropped[kind] = None
        else:
            tools.append(_function(tool, where))
    choice = _choice(body, tools)
    return {"tools": tools, **choice} if tools else {}


def _function(tool: Json, where: str) -> Json:
    schema = get_field(tool, "input_schema", dict, f"{where}.input_schema")
    if schema is None:
        name = f"{where}.input_schema"
        raise BadRequestError(f"{name} is missing; send a JSON schema of type object", param=name)
    if "type" not in schema:
        schema = {"type": "object", **schema}
    function = {"name": get_text(tool, "name", where), "parameters": schema}
    function |= {field: tool[field] for field in COPIED if tool.get(field) is not None}
    return {"type": "function", "function": function}


def _choice(body: Json, tools: list[Json]) -> Json:
    choice = get_field(body, "tool_choice", dict)
    if choice is None:
        return {}
    kind = get_field(choice, "type", str, "tool_choice.type")
    chosen: Any
    if kind == "tool":
        name = get_text(choice, "name", "tool_choice")
        if name not in [tool["function"]["name"] for tool in tools]:
            message = f"tool_choice.name must be one of the tools with an input_schema, not {quoted(name)}"
            raise BadRequestError(message, param="tool_choice.name")
        chosen = {"type": "function", "function": {"name": name}}
    elif kind in CHOICES:
        chosen = CHOICES[kind]
    else:
        raise BadRequestError("tool_choice.type must be auto, any, tool or none", param="tool_choice.type")
    single = get_field(choice, "disable_parallel_tool_use", bool, "tool_choice.disable_parallel_tool_use")
    return {"tool_choice": chosen, **({"parallel_tool_calls": False} if single else {})}
