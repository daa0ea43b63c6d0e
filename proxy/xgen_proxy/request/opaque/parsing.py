"""Reads what routing needs of an opaque request: its model, its hints and how much text it has."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.call import Call, Origin, trace_lines
from xgen_proxy.request.features import Endpoint, Features, Json, UsedAlias
from xgen_proxy.request.fields import MAX_INPUTS, NAME_LENGTH, get_field
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.request.opaque.multipart import Form
from xgen_proxy.request.parsing import read_hints, strip_hints
from xgen_proxy.request.prompt import texts_in, words_in


def parse_opaque(
    origin: Origin,
    endpoint: Endpoint,
    raw: bytes,
    body: Json,
    default_model: Callable[[], str],
    find_alias: Callable[[str], UsedAlias | None] = lambda name: None,
    form: Form | None = None,
) -> Call:
    """`raw`: the bytes that `body` was parsed from, or that `form` describes.

    `find_alias` takes a model's name. The length of a prompt is left to the engine, which may cut it.
    Raises BadRequestError, and whatever `default_model` raises.
    """
    model = get_field(body, "model", str) or default_model()
    if len(model) > NAME_LENGTH:
        raise BadRequestError(f"model has {len(model)} characters; the limit is {NAME_LENGTH}", param="model")
    alias = find_alias(model)
    if alias is not None:
        model = alias.model
    hints = read_hints(body, origin.headers, endpoint)
    urgency, backend = hints.get("urgency") or (alias.urgency if alias else None), hints.get("backend")
    features = Features(
        endpoint=endpoint,
        model=model,
        prompt_words=words_in(_texts(body, endpoint)),
        prompt_tokens=0,
        max_tokens=None,
        stream=form is not None and form.stream,
        include_usage=False,
        needs=frozenset({OPAQUE[endpoint].need}),
        backend=None if backend in (None, "auto") else backend,
        urgency=urgency or "normal",  # type: ignore[arg-type]  # read_hints() has checked it
        task_type=hints.get("task_type"),
        fallback=hints.get("fallback") != "none",
        continuation=True,  # no engine can, which is the reason that the client gets
        hinted=False,
        session=hints.get("session_id"),
        prefix="",
        alias=alias,
    )
    stripped = strip_hints(body, endpoint)
    trace = trace_lines(origin.headers) if b"traceparent" in origin.headers else b""
    unchanged = raw if stripped is body else None
    return Call(origin, features, stripped, unchanged, model, trace, time.perf_counter(), form)


def sequences_of(endpoint: Endpoint, body: Json) -> int:
    """How many sequences an engine runs for the request at once."""
    return max([1, *(len(value) for value in _values(body, endpoint) if isinstance(value, list))])


def _values(body: Json, endpoint: Endpoint) -> list[Any]:
    return [body[field] for field in OPAQUE[endpoint].texts if field in body]


def _texts(body: Json, endpoint: Endpoint) -> list[str]:
    """Raises BadRequestError for more texts than a request may have."""
    for field in OPAQUE[endpoint].texts:
        value = body.get(field)
        if isinstance(value, list) and len(value) > MAX_INPUTS:
            raise BadRequestError(f"{field} has {len(value)} texts; the limit is {MAX_INPUTS}", param=field)
    chat = [body["messages"]] if OPAQUE[endpoint].chat and "messages" in body else []
    return list(texts_in([*_values(body, endpoint), *chat]))
