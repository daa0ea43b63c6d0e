"""The fields of a request body: their types, ranges and sizes. Refuses what is wrong for every backend.

Fields and ranges: https://platform.openai.com/docs/api-reference/chat/create. As in OpenAI's API, null means "not set".
The sizes are constants, because each of these fields is scanned or repeated for every token of the answer, by the proxy
or by an engine: 190,000 stop strings took 60 ms of CPU per chunk. Validation is by hand because every request pays for
it.
"""

from __future__ import annotations

from typing import Any

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import Json

MAX_CHOICES = 128  # in all: n times the number of prompts
MAX_LOGPROBS = 20  # alternatives for each token, as in OpenAI's API; vLLM takes -1 as all of its vocabulary
MAX_INPUTS = 2048  # texts in one request for embeddings, as in OpenAI's API
NAME_LENGTH = 512  # characters; longer than any path of a model file
FUNCTION_NAME_LENGTH = 256  # OpenAI's limit is 64; llama-cpp-python repeats the name in every chunk
INT32_MAX = 2**31 - 1  # llama.cpp reads a larger limit as a negative one, which means no limit

# Fields whose text is part of the prompt or a schema. Every other text is a name, and may have NAME_LENGTH characters.
TEXTS = frozenset({
    "prompt", "input", "suffix", "stop", "system", "instructions", "query", "text", "prefix", "image", "prompt_embeds",
    "chat_template", "grammar", "json_schema", "guided_json", "guided_regex", "guided_grammar", "bad_words",
    "dry_sequence_breakers",
})  # fmt: skip

# field: (most entries, most characters of an entry)
LISTS: dict[str, tuple[int, int]] = {
    "stop": (16, 256),  # OpenAI takes 4
    "stop_token_ids": (128, 16),
    "bad_words": (128, 256),
    "allowed_token_ids": (1024, 16),
    "logit_bias": (1024, 256),  # llama-server takes texts too
    "dry_sequence_breakers": (16, 256),
    "samplers": (32, 64),
    "lora": (16, 64),
}

# field: (lowest, highest, whether an integer)
RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 2, False),
    "top_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "n": (1, MAX_CHOICES, True),
    "best_of": (1, MAX_CHOICES, True),
    "max_tokens": (1, INT32_MAX, True),
    "max_completion_tokens": (1, INT32_MAX, True),
    "min_tokens": (0, INT32_MAX, True),
    "top_logprobs": (0, MAX_LOGPROBS, True),
    "prompt_logprobs": (0, MAX_LOGPROBS, True),
    "top_k": (-1, INT32_MAX, True),
    "seed": (-(2**63), 2**63 - 1, True),
}

KINDS: dict[str, type | tuple[type, ...]] = {
    "tools": list,
    "stop": (str, list),
    "logit_bias": dict,
    "response_format": dict,
}

FUNCTIONS = ("tools", "functions")
CHECKED = frozenset([*RANGES, *KINDS, *LISTS, *FUNCTIONS, "logprobs"])

WORDS: dict[type, str] = {
    str: "a string", bool: "true or false", int: "an integer", float: "a number", list: "an array", dict: "an object",
}  # fmt: skip


def get_field(body: Json, field: str, kind: type | tuple[type, ...], name: str | None = None) -> Any:
    """The field's value, None for null. Raises BadRequestError for another type."""
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(WORDS[each] for each in kinds)
        name = name or field
        raise BadRequestError(f"{name} must be {wanted}, not {WORDS.get(type(value), 'that')}", param=name)
    return value


def whole_number(body: Json, field: str, low: int, high: int) -> int | None:
    """Raises BadRequestError."""
    value = body.get(field)
    if isinstance(value, float) and value.is_integer():  # 100.0, as some languages write 100
        value = int(value)
    if value is None or (type(value) is int and low <= value <= high):
        return value
    raise BadRequestError(f"{field} must be a whole number between {low} and {high}", param=field)


def check_fields(body: Json) -> None:
    """Refuses what OpenAI refuses, and what is too long. The engines answer 400 or 500, or read a negative limit as no
    limit."""
    for field, value in body.items():
        if field in CHECKED:
            _check_field(body, field)
        elif type(value) is str and len(value) > NAME_LENGTH and field not in TEXTS:
            raise BadRequestError(
                f"{quoted(field)} has {len(value)} characters; the limit is {NAME_LENGTH}", param=field[:NAME_LENGTH]
            )


def _check_field(body: Json, field: str) -> None:
    if field in RANGES:
        _check_range(body, field)
    elif field in KINDS:
        get_field(body, field, KINDS[field])
    if field in LISTS:
        _check_list(field, body[field])
    elif field in FUNCTIONS:
        _check_functions(body[field], field)
    elif field == "logprobs":
        _check_logprobs(body[field])


def _check_range(body: Json, field: str) -> None:
    low, high, whole = RANGES[field]
    value = get_field(body, field, int if whole else (int, float))
    if value is not None and not low <= value <= high:
        raise BadRequestError(f"{field} must be between {low} and {high}, not {value}", param=field)


def _check_logprobs(value: Any) -> None:
    """A number on /v1/completions; true or false in chats."""
    if isinstance(value, int | float) and not 0 <= value <= MAX_LOGPROBS:
        raise BadRequestError(f"logprobs must be between 0 and {MAX_LOGPROBS}, not {value}", param="logprobs")


def _check_list(field: str, value: Any) -> None:
    most, longest = LISTS[field]
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | dict):
        return
    if len(entries) > most:
        raise BadRequestError(f"{field} has {len(entries)} entries; the limit is {most}", param=field)
    for entry in entries:
        if isinstance(entry, str) and len(entry) > longest:
            raise BadRequestError(f"{field} has a text of {len(entry)} characters; the limit is {longest}", param=field)


def _check_functions(tools: Any, field: str) -> None:
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and len(name) > FUNCTION_NAME_LENGTH:
            raise BadRequestError(
                f"a function's name has {len(name)} characters; the limit is {FUNCTION_NAME_LENGTH}", param=field
            )


def check_choices(body: Json, prompts: int) -> None:
    """`prompts`: their number. Each of them gets n choices."""
    choices = prompts * max(body.get("n") or 1, body.get("best_of") or 1)
    if choices > MAX_CHOICES:
        raise BadRequestError(
            f"this asks for {choices} choices (n times the number of prompts); the limit is {MAX_CHOICES}",
            param="prompt" if prompts > 1 else "n",
        )
