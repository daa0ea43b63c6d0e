"""The schemas of request bodies, from the types, ranges and sizes that request/fields.py checks."""

from __future__ import annotations

from typing import Any

from xgen_proxy.api.description.operation import Schema
from xgen_proxy.api.generate import GenerateRequest
from xgen_proxy.request.features import HINTS
from xgen_proxy.request.fields import KINDS, LISTS, MAX_INPUTS, MAX_LOGPROBS, NAME_LENGTH, RANGES
from xgen_proxy.request.parsing import OTHER_HINTS, URGENCIES
from xgen_proxy.request.prompt import ROLES

TYPES: dict[type, str] = {str: "string", list: "array", dict: "object", bool: "boolean", int: "integer"}

# In the order in which people look for them; what only one engine knows is last.
MEANINGS = {
    "max_tokens": "The most tokens of the answer.",
    "max_completion_tokens": "OpenAI's newer name for `max_tokens`, which wins.",
    "temperature": "Randomness: 0 always takes the likeliest token.",
    "top_p": "Takes tokens from the likeliest ones that have this probability together.",
    "stop": "Texts that end the answer.",
    "min_tokens": "The least tokens to generate before the answer may end.",
    "seed": "The same seed gives the same answer on the same engine, as far as it can.",
    "n": "Choices. With several prompts, the choices of all count together.",
    "tools": "Functions that the model may call. The request goes to a backend that can.",
    "response_format": "Text, JSON, or JSON of a schema. The request goes to a backend that can.",
    "presence_penalty": "Against tokens that the text has already.",
    "frequency_penalty": "The same, by how often it has them.",
    "logit_bias": "By token id: what is added to its logit.",
    "top_logprobs": "Alternatives for each token.",
    "best_of": "Completions only: the best of so many.",
    "functions": "OpenAI's older name for `tools`.",
    "top_k": "vLLM, llama.cpp: takes tokens from so many of the likeliest; -1 or 0: from all.",
    "stop_token_ids": "vLLM: token ids that end the answer.",
    "bad_words": "vLLM: texts that the answer must not have.",
    "allowed_token_ids": "vLLM: the only token ids that the answer may have.",
    "prompt_logprobs": "vLLM: alternatives for each token of the prompt.",
    "dry_sequence_breakers": "llama.cpp: texts that end a repetition.",
    "samplers": "llama.cpp: its samplers, in order.",
    "lora": "llama.cpp: adapters and their scales.",
}
FORMATS = ("text", "json_object", "json_schema", "structural_tag")
HINT_MEANINGS = {
    "backend": "Hint: the backend to prefer, by name, or `auto`.",
    "urgency": "Hint: `high` goes to the GPU while that has room, and waits less; `low` may wait.",
    "task_type": "Hint: `code_generation` and `creative_writing` choose sampling presets; any other word is allowed.",
    "fallback": "Hint: `none` to get an error rather than another backend's answer.",
    "continuation": "Hint: `none` to get an error event rather than another replica's continuation.",
    "session_id": "Hint: requests of one session go to the replica that has its beginning in its cache.",
}
WORDS_OF_HINTS = {"urgency": list(URGENCIES), "fallback": ["auto", "none"], "continuation": ["auto", "none"]}


def nullable(schema: Schema) -> Schema:
    """As in OpenAI's API, null means "not set"."""
    if "enum" in schema:
        return {**schema, "type": [schema["type"], "null"], "enum": [*schema["enum"], None]}
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    described = {"description": schema["description"]} if "description" in schema else {}
    return {**described, "anyOf": [*schema["anyOf"], {"type": "null"}]}


def checked_fields() -> dict[str, Schema]:
    """The fields that are checked on every endpoint."""
    found: dict[str, Schema] = {}
    for name, (low, high, whole) in RANGES.items():
        found[name] = {"type": "integer" if whole else "number", "minimum": low, "maximum": high}
    for name in {**KINDS, **LISTS}:
        found[name] = _of_kind(name)
    found["tools"]["items"] = {"type": "object"}
    found["response_format"]["properties"] = {"type": {"enum": [*FORMATS, None]}}
    found["functions"] = {"type": "array", "items": {"type": "object"}}
    return {name: nullable({**found[name], "description": MEANINGS[name]}) for name in MEANINGS}


def _of_kind(name: str) -> Schema:
    kinds = KINDS.get(name, list)
    sized = [_sized(kind, *LISTS[name]) if name in LISTS else {"type": TYPES[kind]} for kind in _each(kinds)]
    return sized[0] if len(sized) == 1 else {"anyOf": sized}


def _each(kinds: type | tuple[type, ...]) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _sized(kind: type, most: int, longest: int) -> Schema:
    if kind is str:
        return {"type": "string", "maxLength": longest}
    if kind is dict:
        return {"type": "object", "maxProperties": most, "propertyNames": {"maxLength": longest}}
    return {"type": "array", "maxItems": most, "items": {"maxLength": longest}}


def hints(names: Any = HINTS) -> dict[str, Schema]:
    return {name: nullable({**hint(name), "description": HINT_MEANINGS[name]}) for name in HINTS if name in names}


def hint(name: str) -> Schema:
    if name in WORDS_OF_HINTS:
        return {"type": "string", "enum": WORDS_OF_HINTS[name]}
    return {"type": "string", "maxLength": NAME_LENGTH}


def text(description: str) -> Schema:
    return nullable({"type": "string", "maxLength": NAME_LENGTH, "description": description})


MODEL_FIELD = text("A public model name, see GET /v1/models. Not set: the default model.")
CACHE_KEY = text("OpenAI's name for session_id.")
STREAM: dict[str, Schema] = {
    "stream": nullable({"type": "boolean", "description": "Send the answer as server-sent events."}),
    "stream_options": nullable({
        "type": "object",
        "description": "With `stream` only. `include_usage`: a last chunk has the usage.",
        "properties": {"include_usage": nullable({"type": "boolean"})},
    }),
}  # fmt: skip
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def prompt(description: str, most: int | None = None) -> Schema:
    """A text, several, token ids, or several lists of them."""
    limit = {"maxItems": most} if most else {}
    return {
        "description": description,
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, **limit},
            TOKEN_IDS,
            {"type": "array", "items": TOKEN_IDS, "minItems": 1, **limit},
        ],
    }


def message() -> Schema:
    part = {
        "type": "object",
        "properties": {"type": {"type": "string", "description": "Such as `text` or `image_url`."}},
        "required": ["type"],
    }
    return {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": sorted(ROLES), "description": "Who says it."},
            "content": {
                "description": "A text or parts. May be null for an assistant that calls tools.",
                "anyOf": [{"type": "string"}, {"type": "array", "items": part}, {"type": "null"}],
            },
        },
        "required": ["role"],
    }


def chat_request() -> Schema:
    choice = {
        "description": "`none`, `auto`, `required`, or the one function to call.",
        "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}],
    }
    return _object(
        ["messages"],
        model=MODEL_FIELD,
        messages={"type": "array", "items": {"$ref": "#/components/schemas/Message"}, "minItems": 1},
        **STREAM,
        **checked_fields(),
        tool_choice=choice,
        logprobs=nullable({"type": "boolean", "description": "Whether each token has its log probability."}),
        prompt_cache_key=CACHE_KEY,
        **hints(),
    )


def completion_request() -> Schema:
    logprobs = {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS, "description": "Alternatives for each token."}
    left_out = ("tools", "functions", "top_logprobs")
    return _object(
        ["prompt"],
        model=MODEL_FIELD,
        prompt=prompt("A text, several, token ids, or several lists of them."),
        **STREAM,
        **{name: schema for name, schema in checked_fields().items() if name not in left_out},
        logprobs=nullable(logprobs),
        echo=nullable({"type": "boolean", "description": "Begin the answer with the prompt."}),
        suffix=nullable({"type": "string", "description": "What follows the answer, for engines that fill in."}),
        prompt_cache_key=CACHE_KEY,
        **hints(),
    )


def embeddings_request() -> Schema:
    return _object(
        ["input"],
        model=MODEL_FIELD,
        input=prompt("A text, several, token ids, or several lists of them.", MAX_INPUTS),
        **hints(OTHER_HINTS),
    )  # fmt: skip


def generate_request() -> Schema:
    schema: Schema = without_titles(GenerateRequest.model_json_schema())
    return schema


def _object(required: list[str], **properties: Schema) -> Schema:
    """Fields that it does not name pass through to the backend."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": True}


def without_titles(schema: Any) -> Any:
    """pydantic titles every field with its own name."""
    if isinstance(schema, dict):
        return {key: without_titles(value) for key, value in schema.items() if key != "title" or type(value) is not str}
    return [without_titles(each) for each in schema] if isinstance(schema, list) else schema
