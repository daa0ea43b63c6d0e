"""The rewrites that only llama-cpp-python needs: a body in, the same object out if there is nothing to change."""

from __future__ import annotations

from typing import Any

from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.dialects.llama_cpp_python.json_schema import enforceable
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Json

TOOL_FIELDS = ("tools", "tool_choice", "functions", "function_call")  # also all that a chat template may read


def drop_nulls(body: Json, _: BackendRequest) -> Json:
    return {key: value for key, value in body.items() if value is not None} if None in body.values() else body


def fill_repeat_penalty(body: Json, request: BackendRequest) -> Json:
    if "repeat_penalty" in body or request.features.endpoint == "embeddings":
        return body
    return {**body, "repeat_penalty": 1.0}


def plain_messages(body: Json, request: BackendRequest) -> Json:
    if request.features.endpoint != "chat":
        return body
    return {**body, "messages": [_plain_message(message) for message in body["messages"]]}


def _plain_message(message: Json) -> Json:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part[part["type"]] for part in content if part["type"] in ("text", "refusal"))
    role = "system" if message["role"] == "developer" else message["role"]
    kept = {key: value for key, value in message.items() if value is not None}
    return {**kept, "role": role, "content": content or ""}


def one_prompt(body: Json, request: BackendRequest) -> Json:
    if "token_ids" in request.features.needs or request.prompts > 1:
        raise BadRequestError("this backend takes one prompt, as a string", param="prompt")
    prompt = body.get("prompt")
    return {**body, "prompt": prompt[0]} if isinstance(prompt, list) else body


def one_choice(body: Json, _: BackendRequest) -> Json:
    for field in ("n", "best_of"):
        if (body.get(field) or 1) > 1:
            raise BadRequestError(f"this backend gives one choice: leave {field} out", param=field)
    return body


def json_object_with_schema(body: Json, request: BackendRequest) -> Json:
    response_format = body.get("response_format")
    if not response_format:
        return body
    if request.features.endpoint != "chat" and response_format.get("type") != "text":
        raise BadRequestError("this backend has response_format in chats only", param="response_format")
    schema = response_format.get("schema")
    if response_format.get("type") == "json_schema":
        schema = response_format["json_schema"].get("schema", {})
    if schema is None:
        return body
    return {**body, "response_format": {"type": "json_object", "schema": enforceable(schema, "response_format")}}


def checked_functions(body: Json, _: BackendRequest) -> Json:
    """The parameters of the forced function become a grammar, as a response_format does."""
    if body.keys().isdisjoint(TOOL_FIELDS):
        return body
    body = dict(body)
    for field in ("tools", "functions"):
        if not isinstance(body.get(field, []), list):
            raise BadRequestError(f"{field} must be an array", param=field)
    if "tools" in body:
        body["tools"] = [_checked_tool(tool, _forced(body, "tool_choice")) for tool in body["tools"]]
    if "functions" in body:
        body["functions"] = [_checked_function(each, _forced(body, "function_call")) for each in body["functions"]]
    names = [tool["function"].get("name") for tool in body.get("tools", ())]
    names += [function.get("name") for function in body.get("functions", ())]
    for field in ("tool_choice", "function_call"):
        if isinstance(body.get(field), dict) and _forced(body, field) not in names:
            raise BadRequestError(f"{field} names a function that is not in tools", param=field)
    return body


def _forced(body: Json, field: str) -> Any:
    choice = body.get(field)
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _checked_tool(tool: Any, forced: Any) -> Json:
    if not isinstance(tool, dict):
        raise BadRequestError("each tool must be {type: function, function: {name, parameters}}", param="tools")
    return {**tool, "function": _checked_function(tool.get("function"), forced)}


def _checked_function(function: Any, forced: Any) -> Json:
    if not isinstance(function, dict):
        raise BadRequestError("each tool must be {type: function, function: {name, parameters}}", param="tools")
    kept = {key: value for key, value in function.items() if value is not None}
    parameters = kept.get("parameters", {"type": "object", "additionalProperties": False})
    if function.get("name") == forced:
        parameters = enforceable(parameters, "tools")
    return {**kept, "parameters": parameters}


def drop_unforced_tools(body: Json, request: BackendRequest) -> Json:
    """With tool_choice none the model must not call any."""
    if request.features.needs & {"forced_tool", "tools"} or body.keys().isdisjoint(TOOL_FIELDS):
        return body
    return {key: value for key, value in body.items() if key not in TOOL_FIELDS}


def fill_top_logprobs(body: Json, request: BackendRequest) -> Json:
    wanted = request.features.endpoint == "chat" and body.get("logprobs") and "top_logprobs" not in body
    return {**body, "top_logprobs": 0} if wanted else body


def positive_top_k(body: Json, _: BackendRequest) -> Json:
    return {**body, "top_k": 0} if (body.get("top_k") or 0) < 0 else body
