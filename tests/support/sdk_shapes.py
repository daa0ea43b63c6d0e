"""The requests that an SDK's own types describe: what its test suite sends, and each alternative beside it.

OpenAI's and Anthropic's SDKs declare the parameters of a method as a TypedDict. Their generated test suites send the
required parameters alone and all of them at once. `shapes()` yields both, and each parameter by itself in each form
that its type allows: each kind of message, content part, tool and input item. A new version of an SDK brings new ones.
"""

from __future__ import annotations

import base64
import collections.abc
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any, Literal, Union

import typing_extensions

from tests.support.images import RED, png_bytes

Shape = dict[str, Any]

DEEPEST = 3  # objects within one another, in each alternative; further in, the required fields only
SIMPLE: dict[Any, list[Any]] = {
    str: ["string"], int: [1], float: [1.0], bool: [True, False], object: ["string"], types.NoneType: [None],
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
EXAMPLES: dict[str, Any] = {  # by name, where not any value makes sense
    "model": "m", "url": RED, "image_url": RED, "data": base64.b64encode(png_bytes()).decode(), "schema": SCHEMA,
    "parameters": SCHEMA, "input_schema": SCHEMA, "arguments": "{}", "file": ("a.wav", b"RIFF\0\0\0\0WAVE"),
    "logit_bias": {"5": 1}, "max_tokens": 20,
}  # fmt: skip
WAV = base64.b64encode(b"RIFF\0\0\0\0WAVE").decode()
OBJECTS: dict[str, list[Shape]] = {"input_audio": [{"data": WAV, "format": kind} for kind in ("wav", "mp3")]}  # by name
WRAPPERS = (typing.Annotated, typing_extensions.Required, typing_extensions.NotRequired, typing_extensions.ReadOnly)


def shapes(params: type, always: Shape, never: Collection[str]) -> Iterator[Shape]:
    """The required fields, each other field in each alternative, and all at once, but for the fields in `never`.

    `always`: fields that the API requires although the types do not say so.
    """
    fields, needed = fields_of(params)
    needed |= always
    yield needed
    everything = dict(needed)
    for name, hint in fields.items():
        for value in alternatives(name, hint):
            if name not in never:
                everything.setdefault(name, value)
            yield {**needed, name: value}
    yield everything


def fields_of(params: type, depth: int = 0) -> tuple[dict[str, Any], Shape]:
    """The types by field, and the required fields with a value each.

    `__required_keys__` lacks what is `Required[…]` in a module with postponed annotations.
    """
    fields = typing_extensions.get_type_hints(params, include_extras=True)
    origins: dict[str, Any] = {name: typing_extensions.get_origin(hint) for name, hint in fields.items()}
    required = {name for name in fields if origins[name] is typing_extensions.Required}
    required |= params.__required_keys__  # type: ignore[attr-defined]
    needed = {}
    for name in fields:
        if name in required:
            for value in alternatives(name, fields[name], depth):
                needed[name] = value
                break
    return fields, needed


def alternatives(name: str, hint: Any, depth: int = 0) -> Iterator[Any]:
    """A value for each form of a type. None where a value cannot be JSON, like an open file."""
    origin = typing_extensions.get_origin(hint)
    while origin in WRAPPERS:
        hint = typing_extensions.get_args(hint)[0]
        origin = typing_extensions.get_origin(hint)
    arguments = typing_extensions.get_args(hint)
    if name in OBJECTS:
        yield from OBJECTS[name]
    elif typing_extensions.is_typeddict(hint):
        yield from objects(hint, depth + 1)
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from alternatives(name, member, depth)
    elif name in EXAMPLES:
        if origin is not Literal and hint is not types.NoneType:
            yield EXAMPLES[name]
    elif origin is Literal:
        yield from arguments
    elif origin is dict:
        yield from ({"key": value} for value in alternatives("", arguments[1], depth))
    elif isinstance(origin, type) and issubclass(origin, collections.abc.Iterable) and len(arguments) == 1:
        yield from ([value] for value in alternatives("", arguments[0], depth))
    else:
        yield from SIMPLE.get(hint, [])


def objects(params: type, depth: int) -> Iterator[Shape]:
    """The required fields, all fields, and each field in each further alternative."""
    fields, needed = fields_of(params, depth)
    yield needed
    if depth > DEEPEST:
        return
    everything, varied = dict(needed), []
    for name, hint in fields.items():
        first, *others = [*alternatives(name, hint, depth)] or [None]
        if first is not None:
            everything[name] = first
        varied += [{**needed, name: value} for value in others]
    if everything != needed:
        yield everything
    yield from varied
