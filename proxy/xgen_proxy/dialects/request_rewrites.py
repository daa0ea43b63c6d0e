"""The rules of bodies.py, one function each: a body in, the same object out where there is nothing to do. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xgen_proxy.dialects.dialect import LLAMA_CPP_PYTHON, LLAMA_SERVER, BackendRequest, Dialect, Json
from xgen_proxy.dialects.llama_cpp_python.json_schema import enforceable
from xgen_proxy.dialects.llama_cpp_python.request_models import read_fields
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.limits import schemas

LEGACY_COMPLETION_TOKENS = 16  # OpenAI's default on /v1/completions


def name_model(body: Json, request: BackendRequest) -> Json:
    return body if body.get("model") == request.served else {**body, "model": request.served}


def drop_nulls(body: Json, _: BackendRequest) -> Json:
    return {key: value for key, value in body.items() if value is not None} if None in body.values() else body


def name_max_tokens(body: Json, _: BackendRequest) -> Json:
    """It replaced max_tokens and wins."""
    if body.get("max_completion_tokens") is None:
        return body
    body = dict(body)
    body["max_tokens"] = body.pop("max_completion_tokens")
    return body


def name_legacy_max_tokens(body: Json, request: BackendRequest) -> Json:
    return name_max_tokens(body, request) if request.features.endpoint == "completions" else body


def limit_legacy_completion(body: Json, request: BackendRequest) -> Json:
    if request.features.endpoint != "completions" or request.features.max_tokens is not None:
        return body
    return {**body, "max_tokens": LEGACY_COMPLETION_TOKENS}


def asks_for_stream(dialect: Dialect, request: BackendRequest) -> bool:
    """Is it asked for a stream? llama-cpp-python loses characters in a stream with logprobs, and forgets to echo, so
    that it is asked for the whole then, which it does not cancel."""
    if request.features.endpoint == "embeddings":
        return False
    if dialect.name == "llama-cpp-python" and request.features.needs & {"logprobs", "echo"}:
        return False
    return request.features.stream or dialect.streams_only


def stream_here(body: Json, request: BackendRequest) -> Json:
    return {**body, "stream": True} if asks_for_stream(LLAMA_SERVER, request) else body


def stream_where_right(body: Json, request: BackendRequest) -> Json:
    if request.features.endpoint == "embeddings":
        return body
    return {**body, "stream": asks_for_stream(LLAMA_CPP_PYTHON, request)}


def always_usage(body: Json, request: BackendRequest) -> Json:
    """Only for what is put together here; a client's own stream gets what the client asked for."""
    if request.features.endpoint == "embeddings" or request.features.stream:
        return body
    return {**body, "stream_options": {"include_usage": True}}


def no_repeat_penalty(body: Json, request: BackendRequest) -> Json:
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


def refuse(field: str, why: str) -> Callable[[Json, BackendRequest], Json]:
    def rule(body: Json, _: BackendRequest) -> Json:
        if body.get(field):
            raise BadRequestError(f"this backend cannot do {field}: {why}", param=field)
        return body

    return rule


def schema_of_completion(body: Json, request: BackendRequest) -> Json:
    """/v1/completions has llama.cpp's own field for it."""
    response_format = body.get("response_format")
    if request.features.endpoint != "completions" or not response_format or response_format.get("type") == "text":
        return body
    holder = response_format["json_schema"] if response_format.get("type") == "json_schema" else response_format
    schema = holder.get("schema") or {"type": "object"}
    kept = {key: value for key, value in body.items() if key != "response_format"}
    return {**kept, "json_schema": schema}


# llama.cpp's own fields that cost memory or time by their size: a repeat_last_n of 10^9 took 19 s.
SIZES = {"repeat_last_n": 4096, "dry_penalty_last_n": 4096, "n_probs": 20}


def bounded_sizes(body: Json, _: BackendRequest) -> Json:
    for field in SIZES.keys() & body.keys():
        value = body[field]
        if value is not None and (not isinstance(value, int) or value > SIZES[field]):
            raise BadRequestError(f"{field} must be a whole number up to {SIZES[field]}", param=field)
    return body


WIDEST = 250  # values in one place of a schema; 500 held it up for 3 s, 2,000 for 25 s
WIDE_KEYWORDS = ("enum", "anyOf", "oneOf")


def narrow_schemas(body: Json, _: BackendRequest) -> Json:
    for field, schema in schemas(body):
        if _widest(schema) > WIDEST:
            raise BadRequestError(
                f"this backend takes no schema with more than {WIDEST} values in one enum", param=field
            )
    return body


def _widest(schema: Any) -> int:
    widest = 0
    level = [schema]
    while level:
        each = level.pop()
        if isinstance(each, dict):
            lists = [each.get(keyword) for keyword in WIDE_KEYWORDS]
            widest = max(widest, *(len(found) if isinstance(found, list) else 0 for found in lists))
            level.extend(each.values())
        elif isinstance(each, list):
            level.extend(each)
    return widest


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


def known_functions(body: Json, _: BackendRequest) -> Json:
    """The forced function's parameters become a grammar, as a response_format does."""
    if not body.keys() & {"tools", "tool_choice", "functions", "function_call"}:
        return body
    body = dict(body)
    for field in ("tools", "functions"):
        if not isinstance(body.get(field, []), list):
            raise BadRequestError(f"{field} must be an array", param=field)
    if "tools" in body:
        body["tools"] = [_known_tool(tool, _forced(body, "tool_choice")) for tool in body["tools"]]
    if "functions" in body:
        body["functions"] = [_known_function(each, _forced(body, "function_call")) for each in body["functions"]]
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


def _known_tool(tool: Any, forced: Any) -> Json:
    if not isinstance(tool, dict):
        raise BadRequestError("each tool must be {type: function, function: {name, parameters}}", param="tools")
    return {**tool, "function": _known_function(tool.get("function"), forced)}


def _known_function(function: Any, forced: Any) -> Json:
    if not isinstance(function, dict):
        raise BadRequestError("each tool must be {type: function, function: {name, parameters}}", param="tools")
    kept = {key: value for key, value in function.items() if value is not None}
    parameters = kept.get("parameters", {"type": "object", "additionalProperties": False})
    if function.get("name") == forced:
        parameters = enforceable(parameters, "tools")
    return {**kept, "parameters": parameters}


TOOL_FIELDS = {"tools", "tool_choice", "functions", "function_call"}


def no_unforced_tools(body: Json, request: BackendRequest) -> Json:
    """tool_choice none: the model must not call any, and the templates would ignore them."""
    if request.features.needs & {"forced_tool", "tools"} or not body.keys() & TOOL_FIELDS:
        return body
    return {key: value for key, value in body.items() if key not in TOOL_FIELDS}


def no_functions(body: Json, _: BackendRequest) -> Json:
    if body.get("functions") and body.get("function_call") != "none":
        raise BadRequestError("this backend ignores functions: use tools and tool_choice", param="functions")
    return body


def logprobs_of_the_token(body: Json, request: BackendRequest) -> Json:
    wanted = request.features.endpoint == "chat" and body.get("logprobs") and "top_logprobs" not in body
    return {**body, "top_logprobs": 0} if wanted else body


def all_top_k(body: Json, _: BackendRequest) -> Json:
    return {**body, "top_k": 0} if (body.get("top_k") or 0) < 0 else body


def strings_to_stop(body: Json, request: BackendRequest) -> Json:
    stop = body.get("stop")
    if isinstance(stop, list) and not all(isinstance(each, str) for each in stop):
        raise BadRequestError("stop must be a string or an array of strings", param="stop")
    if stop is None or not asks_for_stream(LLAMA_CPP_PYTHON, request):
        return body
    return {key: value for key, value in body.items() if key != "stop"}


def known_fields(body: Json, request: BackendRequest) -> Json:
    return read_fields(request.features.endpoint, body)


def rename(old: str, new: str) -> Callable[[Json, BackendRequest], Json]:
    def rule(body: Json, _: BackendRequest) -> Json:
        if body.get(old) is None:
            return body
        body = dict(body)
        value = body.pop(old)
        return body if body.get(new) is not None else {**body, new: value}

    return rule


def guided_to_structured(body: Json, _: BackendRequest) -> Json:
    guided = {key: body[key] for key in GUIDED if body.get(key) is not None}
    if not guided:
        return body
    kept = {key: value for key, value in body.items() if key not in GUIDED}
    own = body.get("structured_outputs")
    kept["structured_outputs"] = {
        **(own if isinstance(own, dict) else {}), **{GUIDED[name]: value for name, value in guided.items()},
    }  # fmt: skip
    return kept


GUIDED = {"guided_json": "json", "guided_choice": "choice", "guided_regex": "regex", "guided_grammar": "grammar"}
