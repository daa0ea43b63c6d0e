"""The prompt of a request: its texts, checked, and how long it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import PROMPT_FIELD, Endpoint, Json
from xgen_proxy.request.fields import MAX_INPUTS, check_choices, get_field
from xgen_proxy.request.limits import Limits
from xgen_proxy.values import frozen

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
NO_CONTENT = frozenset({"assistant", "function"})  # roles whose content may be null
DEFINITIONS = ("tools", "functions")
WORDS_SAMPLE = 100_000  # characters; routing thresholds are far lower
TOKENS_PER_100_WORDS = 130  # of English
PREFIX_CHARACTERS = 512  # of each text; enough to tell one conversation from another


@frozen
class Prompt:
    """`words` are counted, or what the estimated tokens would be in English words if that is more: Chinese and minified
    JSON have hardly any white space. `tokens` is an estimate for the context check: of several prompts, the longest.
    """

    words: int
    tokens: int
    token_ids: bool
    several: bool
    prefix: str  # the beginning of the prompt, up to and including the user's first message


def read_prompt(body: Json, endpoint: Endpoint, limits: Limits) -> Prompt:
    """Raises BadRequestError, which names the field and what it should be."""
    if endpoint == "chat":
        return _read_chat(body, limits)
    field = PROMPT_FIELD[endpoint]
    prompt = get_field(body, field, (str, list))
    if prompt is None or prompt == []:
        raise BadRequestError(f"{field} is missing; send a string", param=field)
    texts: list[str] = []
    ids: list[int] = []  # how many each prompt has
    if isinstance(prompt, str):
        texts = [prompt]
    elif all(isinstance(each, str) for each in prompt):
        texts = prompt
    elif _is_token_ids(prompt):
        ids = [len(prompt)]
    elif all(isinstance(each, list) and _is_token_ids(each) for each in prompt):
        ids = [len(each) for each in prompt]
    else:
        raise BadRequestError(f"{field} must be a string, an array of strings, or token ids", param=field)
    prompts = len(texts) or len(ids)
    if endpoint == "completions":
        check_choices(body, prompts)
    elif prompts > MAX_INPUTS:
        raise BadRequestError(f"input has {prompts} texts; the limit is {MAX_INPUTS}", param=field)
    tokens = [*map(estimate_tokens, texts), *ids]
    words = _words(texts, sum(tokens))
    return Prompt(words, max(tokens), bool(ids), prompts > 1, _prefix(texts[:1]))


def _read_chat(body: Json, limits: Limits) -> Prompt:
    texts = list(_message_texts(body, limits))
    prefix = _prefix(texts[: 2 if body["messages"][0]["role"] in ("system", "developer") else 1])
    if written := _tool_fields(body):
        texts += texts_in(written)
    tokens = sum(map(estimate_tokens, texts))
    return Prompt(_words(texts, tokens), tokens, False, False, prefix)


def words_in(texts: list[str]) -> int:
    return _words(texts, sum(map(estimate_tokens, texts)))


def _words(texts: list[str], tokens: int) -> int:
    counted, as_many = count_words(texts), tokens * 100 // TOKENS_PER_100_WORDS
    return counted if counted > as_many else as_many


def _prefix(texts: list[str]) -> str:
    """The same text for every turn of a conversation."""
    return "\n".join(text[:PREFIX_CHARACTERS] for text in texts)


def count_words(texts: list[str]) -> int:
    """Exact up to WORDS_SAMPLE characters in all, and extrapolated beyond, since counting 10 MB takes 0.1 s."""
    size = sum(map(len, texts))
    if size <= WORDS_SAMPLE:
        return len(" ".join(texts).split())
    words, left = 0, WORDS_SAMPLE
    for text in texts:
        words += len(text[:left].split())
        left -= len(text)
        if left <= 0:
            break
    return words * size // WORDS_SAMPLE


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


def _message_texts(body: Json, limits: Limits) -> Iterator[str]:
    messages = get_field(body, "messages", list)
    if not messages:
        raise BadRequestError("messages is missing or empty; send at least one message", param="messages")
    if len(messages) > limits.messages:
        raise BadRequestError(f"there are {len(messages)} messages; the limit is {limits.messages}", param="messages")
    left = limits.messages  # parts count too
    for index, message in enumerate(messages):
        name = f"messages.{index}"
        if not isinstance(message, dict):
            raise BadRequestError(f"{name} must be an object with role and content", param=name)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequestError(f"{name}.role must be one of {', '.join(sorted(ROLES))}", param=f"{name}.role")
        content = get_field(message, "content", (str, list), f"{name}.content")
        if isinstance(content, str):
            yield content
        elif content is not None:
            left -= len(content)
            if left < 0:
                raise BadRequestError(f"there are more than {limits.messages} content parts", param=f"{name}.content")
            yield from _part_texts(content, f"{name}.content")
        elif role not in NO_CONTENT:
            raise BadRequestError(f"{name}.content is missing; send a string", param=f"{name}.content")


def _part_texts(content: list[Any], name: str) -> Iterator[str]:
    for number, part in enumerate(content):
        where = f"{name}.{number}"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadRequestError(f"{where} must be an object with a type, such as text", param=where)
        if part["type"] in ("text", "refusal"):
            yield _part_text(part, where)


def _part_text(part: Json, where: str) -> str:
    text = part.get(part["type"])
    if not isinstance(text, str):
        raise BadRequestError(f"{where}.{part['type']} must be a string", param=where)
    return text


def _tool_fields(body: Json) -> list[Any]:
    """The tools' definitions and the calls of earlier turns, which templates write into the prompt too."""
    found = [body[field] for field in DEFINITIONS if field in body]
    for message in body["messages"]:
        if "tool_calls" in message:
            found.append(message["tool_calls"])
        elif "function_call" in message:
            found.append(message["function_call"])
    return found


def texts_in(level: list[Any]) -> Iterator[str]:
    """All texts of some JSON, keys too. Empties `level`."""
    while level:
        each = level.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            level.extend(each)
            level.extend(each.values())
        elif isinstance(each, list):
            level.extend(each)


def _is_token_ids(value: list[Any]) -> bool:
    return value != [] and all(type(each) is int and each >= 0 for each in value)


def has_media(body: Json) -> bool:
    """Whether a checked chat has any part that is no text."""
    return any(
        part["type"] not in ("text", "refusal")
        for message in body["messages"]
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
