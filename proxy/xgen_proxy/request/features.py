"""Reads from a request body what routing needs to know, and refuses what is wrong for every backend.

Fields and ranges: https://platform.openai.com/docs/api-reference/chat/create. As in OpenAI's API, null means "not set".
Validation is by hand because it takes 19 µs, and every request pays for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.limits import Limits, check_schemas
from xgen_proxy.values import frozen

Endpoint = Literal["chat", "completions", "embeddings"]
Urgency = Literal["high", "normal", "low"]

Need = Literal[
    "embeddings",  # the /v1/embeddings endpoint
    "images",  # any image, audio or file content part
    "tools",  # the model chooses a tool (tool_choice auto, required or absent)
    "forced_tool",  # tool_choice names the function
    "n",  # several choices (n or best_of > 1)
    "logprobs",
    "json_object",
    "json_schema",
    "grammar",  # llama.cpp's fields grammar and json_schema; other engines would leave the output unconstrained
    "structured_outputs",  # vLLM's field
    "prompt_list",  # several prompts in one /v1/completions
    "token_ids",  # a prompt as token ids
    "echo",
    "suffix",
]
NEEDS = frozenset(get_args(Need))
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
HINTS = {"backend": b"x-backend", "urgency": b"x-urgency", "task_type": b"x-task-type", "fallback": b"x-fallback",
         "continuation": b"x-continuation", "session_id": b"x-session-id"}  # fmt: skip
HINT_HEADERS = frozenset(HINTS.values())
URGENCIES: tuple[str, ...] = get_args(Urgency)
MAX_CHOICES = 128
WORDS_SAMPLE = 100_000  # characters; routing thresholds are far lower
PREFIX_CHARACTERS = 512  # of each text; enough to tell one conversation from another
INT32_MAX = 2**31 - 1  # llama.cpp reads a larger limit as a negative one, which means no limit

PROMPT_FIELD: dict[Endpoint, str] = {"chat": "messages", "completions": "prompt", "embeddings": "input"}

Json = dict[str, Any]


@frozen
class Features:
    """`prompt_tokens` is an estimate, see estimate_tokens(). `max_tokens` is None if the client set none."""

    endpoint: Endpoint
    model: str | None
    prompt_words: int
    prompt_tokens: int
    max_tokens: int | None
    stream: bool
    include_usage: bool
    needs: frozenset[Need]
    backend: str | None  # None: auto
    urgency: Urgency
    task_type: str | None
    fallback: bool
    continuation: bool  # a broken stream may be resumed on another replica
    hinted: bool  # the client gave an urgency or a task type, so presets apply
    session: str | None  # requests of one session begin alike
    prefix: str  # the beginning of the prompt, up to and including the user's first message


def parse_features(body: Json, headers: Mapping[bytes, bytes], endpoint: Endpoint, limits: Limits) -> Features:
    """Raises BadRequestError, which names the field and what it should be."""
    check_schemas(body, limits)
    check_ranges(body)
    texts = list(_texts(body, endpoint, limits))
    hints = _hints(body, headers)
    urgency, task_type, backend = hints.get("urgency"), hints.get("task_type"), hints.get("backend")
    ids = _token_ids(body, endpoint)
    return Features(
        endpoint=endpoint,
        model=_get(body, "model", str) or None,
        prompt_words=count_words(texts) + ids * 3 // 4,
        prompt_tokens=sum(estimate_tokens(text) for text in texts) + ids,
        max_tokens=_max_tokens(body),
        stream=bool(_get(body, "stream", bool)),
        include_usage=_include_usage(body),
        needs=_needs(body, endpoint),
        backend=None if backend in (None, "auto") else backend,
        urgency=urgency or "normal",  # type: ignore[arg-type]  # checked above
        task_type=task_type,
        fallback=hints.get("fallback") != "none",
        continuation=hints.get("continuation") != "none",
        hinted=urgency is not None or task_type is not None,
        session=hints.get("session_id") or _get(body, "prompt_cache_key", str),
        prefix=_prefix(body, endpoint, texts),
    )


def _prefix(body: Json, endpoint: Endpoint, texts: list[str]) -> str:
    """The same text for every turn of a conversation."""
    own = 2 if endpoint == "chat" and body["messages"][0]["role"] in ("system", "developer") else 1
    return "\n".join(text[:PREFIX_CHARACTERS] for text in texts[:own])


def _hints(body: Json, headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """The hints that are given. Raises BadRequestError."""
    if HINTS.keys().isdisjoint(body) and HINT_HEADERS.isdisjoint(headers):
        return {}
    hints = {name: value for name in HINTS if (value := _hint(body, headers, name))}
    if hints.get("urgency", "normal") not in URGENCIES:
        raise BadRequestError(f"urgency must be high, normal or low, not {quoted(hints['urgency'])}", param="urgency")
    for name in ("fallback", "continuation"):
        if hints.get(name, "auto") not in ("auto", "none"):
            raise BadRequestError(f"{name} must be none or auto, not {quoted(hints[name])}", param=name)
    return hints


def strip_hints(body: Json) -> Json:
    """Returns the same object if there are none."""
    if HINTS.keys().isdisjoint(body):
        return body
    return {key: value for key, value in body.items() if key not in HINTS}


def count_words(texts: list[str]) -> int:
    """Exact up to WORDS_SAMPLE characters in all, and extrapolated beyond, since counting 10 MB takes 0.1 s."""
    whole = " ".join(texts)
    words = len(whole[:WORDS_SAMPLE].split())
    return words if len(whole) <= WORDS_SAMPLE else words * len(whole) // WORDS_SAMPLE


def quoted(value: Any) -> str:
    """A value that the client sent, short enough for a message."""
    return repr(value)[:60] if isinstance(value, str | int | float) else "that"


def estimate_tokens(text: str) -> int:
    """Number of tokens in `text` without a tokenizer, for context checks and time limits.

    A token is about 4.2 bytes of ASCII; other scripts take a token for each 1.1 bytes of UTF-8. Against SmolLM2's
    tokenizer, on pieces of 200 characters, the median of estimate/truth was 1.02 for English, 0.98 for Korean and 0.92
    for code; the extremes were 0.64 and 1.55 (bench/estimate.py).
    """
    if text.isascii():
        return int(len(text) / 4.2) + 1
    size = len(text.encode())
    other = (size - len(text)) * 1.5  # nearly all of these are characters of three bytes
    return int(max(size - other, 0) / 4.2 + other / 1.1) + 1


def _get(body: Json, field: str, kind: type | tuple[type, ...], name: str | None = None) -> Any:
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


WORDS: dict[type, str] = {
    str: "a string", bool: "true or false", int: "an integer", float: "a number", list: "an array", dict: "an object",
}  # fmt: skip

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
    "top_logprobs": (0, 20, True),
    "top_k": (-1, INT32_MAX, True),
    "seed": (-(2**63), 2**63 - 1, True),
}


KINDS: dict[str, type | tuple[type, ...]] = {
    "tools": list,
    "stop": (str, list),
    "logit_bias": dict,
    "response_format": dict,
}


def check_ranges(body: Json) -> None:
    """Refuses what OpenAI refuses. The engines answer 400 or 500, or read a negative limit as no limit."""
    for field in body:
        if field in RANGES:
            low, high, whole = RANGES[field]
            value = _get(body, field, int if whole else (int, float))
            if value is not None and not low <= value <= high:
                raise BadRequestError(f"{field} must be between {low} and {high}, not {value}", param=field)
        elif field in KINDS:
            _get(body, field, KINDS[field])


def _texts(body: Json, endpoint: Endpoint, limits: Limits) -> Iterator[str]:
    if endpoint == "chat":
        yield from _message_texts(body, limits)
        return
    field = PROMPT_FIELD[endpoint]
    prompt = _get(body, field, (str, list))
    if prompt is None or prompt == []:
        raise BadRequestError(f"{field} is missing; send a string", param=field)
    if isinstance(prompt, str):
        yield prompt
    elif all(isinstance(each, str) for each in prompt):
        yield from prompt
    elif not _is_token_ids(prompt) and not all(isinstance(each, list) and _is_token_ids(each) for each in prompt):
        raise BadRequestError(f"{field} must be a string, an array of strings, or token ids", param=field)


def _message_texts(body: Json, limits: Limits) -> Iterator[str]:
    messages = _get(body, "messages", list)
    if not messages:
        raise BadRequestError("messages is missing or empty; send at least one message", param="messages")
    if len(messages) > limits.messages:
        raise BadRequestError(f"there are {len(messages)} messages; the limit is {limits.messages}", param="messages")
    for index, message in enumerate(messages):
        name = f"messages.{index}"
        if not isinstance(message, dict):
            raise BadRequestError(f"{name} must be an object with role and content", param=name)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequestError(f"{name}.role must be one of {', '.join(sorted(ROLES))}", param=f"{name}.role")
        yield from _content_texts(message, name, role)


def _content_texts(message: Json, name: str, role: str) -> Iterator[str]:
    content = _get(message, "content", (str, list), f"{name}.content")
    if content is None:
        if role not in ("assistant", "function"):
            raise BadRequestError(f"{name}.content is missing; send a string", param=f"{name}.content")
    elif isinstance(content, str):
        yield content
    else:
        for number, part in enumerate(content):
            where = f"{name}.content.{number}"
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise BadRequestError(f"{where} must be an object with a type, such as text", param=where)
            if part["type"] in ("text", "refusal"):
                yield _part_text(part, where)


def _part_text(part: Json, where: str) -> str:
    text = part.get(part["type"])
    if not isinstance(text, str):
        raise BadRequestError(f"{where}.{part['type']} must be a string", param=where)
    return text


def _is_token_ids(value: list[Any]) -> bool:
    return value != [] and all(type(each) is int and each >= 0 for each in value)


def _token_ids(body: Json, endpoint: Endpoint) -> int:
    """Number of token ids in the prompt, which _texts() has checked."""
    prompt = body[PROMPT_FIELD[endpoint]]
    if endpoint == "chat" or not isinstance(prompt, list):
        return 0
    return sum(1 if isinstance(each, int) else len(each) for each in prompt if isinstance(each, int | list))


def _max_tokens(body: Json) -> int | None:
    """max_completion_tokens replaced max_tokens and wins."""
    value: int | None = body.get("max_completion_tokens")
    return value if value is not None else body.get("max_tokens")


def _include_usage(body: Json) -> bool:
    options = _get(body, "stream_options", dict)
    if options is None:
        return False
    if not body.get("stream"):
        raise BadRequestError("stream_options goes with stream: true only", param="stream_options")
    return bool(_get(options, "include_usage", bool, "stream_options.include_usage"))


def _hint(body: Json, headers: Mapping[bytes, bytes], name: str) -> str | None:
    """From the body, else from the header X-Name. An empty value counts as not given."""
    value: str | None = _get(body, name, str)
    if value is None:
        value = headers.get(HINTS[name], b"").decode("latin-1")
    return value or None


OWN_FIELDS: tuple[Need, ...] = ("grammar", "structured_outputs", "echo", "suffix")
NEED_FIELDS = {
    *OWN_FIELDS, "json_schema", "n", "best_of", "logprobs", "response_format", "tools", "tool_choice", "functions",
    "prompt",
}  # fmt: skip


def _needs(body: Json, endpoint: Endpoint) -> frozenset[Need]:
    if endpoint == "embeddings":
        return frozenset({"embeddings"})
    needs: set[Need] = {"images"} if endpoint == "chat" and _has_media(body) else set()
    if NEED_FIELDS.isdisjoint(body):
        return frozenset(needs)
    if (body.get("n") or 1) > 1 or (body.get("best_of") or 1) > 1:
        needs.add("n")
    if body.get("logprobs") is not None and body["logprobs"] is not False:  # 0 asks for the chosen token's own
        needs.add("logprobs")
    needs.update(field for field in OWN_FIELDS if body.get(field))
    if body.get("json_schema"):
        needs.add("grammar")
    needs.update(_format_needs(body))
    needs.update(_tool_needs(body) if endpoint == "chat" else _prompt_needs(body))
    return frozenset(needs)


def _format_needs(body: Json) -> Iterator[Need]:
    response_format = body.get("response_format") or {}
    kind = response_format.get("type")
    if kind in ("json_object", "json_schema"):
        yield kind
    elif kind not in (None, "text"):
        raise BadRequestError(
            f"response_format.type must be text, json_object or json_schema, not {quoted(kind)}",
            param="response_format",
        )
    if kind == "json_schema":
        wrapper = response_format.get("json_schema")
        if not isinstance(wrapper, dict) or not isinstance(wrapper.get("schema") or {}, dict):
            raise BadRequestError("response_format.json_schema must be {name, schema: {…}}", param="response_format")


def _tool_needs(body: Json) -> Iterator[Need]:
    choice = _get(body, "tool_choice", (str, dict))
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise BadRequestError("tool_choice must be none, auto, required or an object", param="tool_choice")
    if not body.get("tools") and not body.get("functions"):
        return
    if isinstance(choice, dict):
        yield "forced_tool"
    elif choice != "none":
        yield "tools"


def _prompt_needs(body: Json) -> Iterator[Need]:
    prompt = body["prompt"]
    if isinstance(prompt, list):
        if not isinstance(prompt[0], str):
            yield "token_ids"
        if len(prompt) > 1 and not isinstance(prompt[0], int):
            yield "prompt_list"


def _has_media(body: Json) -> bool:
    return any(
        part["type"] not in ("text", "refusal")
        for message in body["messages"]
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
