"""Reads a request's features from its body and headers. As in OpenAI's API, null means "not set"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import get_args

from xgen_proxy.errors import BadRequestError, quoted
from xgen_proxy.request.features import HINTS, Endpoint, Features, Json, Need, Urgency
from xgen_proxy.request.fields import NAME_LENGTH, check_fields, get_field
from xgen_proxy.request.limits import Limits, check_schemas
from xgen_proxy.request.prompt import Prompt, read_prompt

HINT_HEADERS = frozenset(HINTS.values())
OTHER_HINTS = frozenset({"backend", "session_id"})  # in the body; all headers are hints
# Open WebUI's. It sends the chat's id with ENABLE_FORWARD_USER_INFO_HEADERS, and the task where its connection has the
# header X-OpenWebUI-Task: {{TASK}}. No one waits for these tasks.
# https://docs.openwebui.com/getting-started/env-configuration
BACKGROUND = frozenset({b"title_generation", b"tags_generation", b"follow_up_generation", b"emoji_generation"})
URGENCIES: tuple[str, ...] = get_args(Urgency)


def parse_features(body: Json, headers: Mapping[bytes, bytes], endpoint: Endpoint, limits: Limits) -> Features:
    """Raises BadRequestError, which names the field and what it should be."""
    check_schemas(body, limits)
    check_fields(body)
    prompt = read_prompt(body, endpoint, limits)
    hints = read_hints(body, headers, endpoint)
    urgency, task_type, backend = hints.get("urgency"), hints.get("task_type"), hints.get("backend")
    return Features(
        endpoint=endpoint,
        model=get_field(body, "model", str) or None,
        prompt_words=prompt.words,
        prompt_tokens=prompt.tokens,
        max_tokens=_max_tokens(body),
        stream=bool(get_field(body, "stream", bool)),
        include_usage=_include_usage(body),
        needs=_needs(body, endpoint, prompt),
        backend=None if backend in (None, "auto") else backend,
        urgency=urgency or ("low" if headers.get(b"x-openwebui-task") in BACKGROUND else "normal"),  # type: ignore[arg-type]  # checked
        task_type=task_type,
        fallback=hints.get("fallback") != "none",
        continuation=hints.get("continuation") != "none",
        hinted=urgency is not None or task_type is not None,
        session=hints.get("session_id") or get_field(body, "prompt_cache_key", str) or _chat_id(headers),
        prefix=prompt.prefix,
    )


def _chat_id(headers: Mapping[bytes, bytes]) -> str | None:
    value = headers.get(b"x-openwebui-chat-id")
    return value[:NAME_LENGTH].decode("latin-1") or None if value else None


def read_hints(body: Json, headers: Mapping[bytes, bytes], endpoint: Endpoint) -> dict[str, str]:
    """The hints that are given, from the body, else from the header X-Name. An empty value counts as not given.

    Raises BadRequestError.
    """
    if HINTS.keys().isdisjoint(body) and HINT_HEADERS.isdisjoint(headers):
        return {}
    in_body = _body_hints(endpoint)
    hints: dict[str, str] = {}
    for name, header in HINTS.items():
        value = get_field(body, name, str) if name in in_body else None
        value = headers.get(header, b"").decode("latin-1") if value is None else value
        if len(value) > NAME_LENGTH:
            raise BadRequestError(f"{name} has {len(value)} characters; the limit is {NAME_LENGTH}", param=name)
        if value:
            hints[name] = value
    if hints.get("urgency", "normal") not in URGENCIES:
        raise BadRequestError(f"urgency must be high, normal or low, not {quoted(hints['urgency'])}", param="urgency")
    for name in ("fallback", "continuation"):
        if hints.get(name, "auto") not in ("auto", "none"):
            raise BadRequestError(f"{name} must be none or auto, not {quoted(hints[name])}", param=name)
    return hints


def _body_hints(endpoint: Endpoint) -> Set[str]:
    """Where no text is generated the others have no use, and other APIs have fields of these names: Jina's and Google's
    `task_type` chooses the kind of vector."""
    return HINTS.keys() if endpoint in ("chat", "completions") else OTHER_HINTS


def strip_hints(body: Json, endpoint: Endpoint) -> Json:
    """Returns the same object if there are none."""
    hints = _body_hints(endpoint)
    if hints.isdisjoint(body):
        return body
    return {key: value for key, value in body.items() if key not in hints}


def _max_tokens(body: Json) -> int | None:
    """max_completion_tokens replaced max_tokens and wins."""
    value: int | None = body.get("max_completion_tokens")
    return value if value is not None else body.get("max_tokens")


def _include_usage(body: Json) -> bool:
    options = get_field(body, "stream_options", dict)
    if options is None:
        return False
    if not body.get("stream"):
        raise BadRequestError("stream_options goes with stream: true only", param="stream_options")
    return bool(get_field(options, "include_usage", bool, "stream_options.include_usage"))


GENERATION: frozenset[Need] = frozenset({"generation"})  # all that most requests need
OWN_FIELDS: tuple[Need, ...] = ("grammar", "structured_outputs", "echo", "suffix")
GUIDED = ("guided_json", "guided_choice", "guided_regex", "guided_grammar")  # vLLM's older names of structured_outputs
NEED_FIELDS = {
    *OWN_FIELDS, *GUIDED, "json_schema", "n", "best_of", "logprobs", "response_format", "tools", "tool_choice",
    "functions",
}  # fmt: skip


def _needs(body: Json, endpoint: Endpoint, prompt: Prompt) -> frozenset[Need]:
    if endpoint == "embeddings":
        return frozenset({"embeddings", "token_ids"}) if prompt.token_ids else frozenset({"embeddings"})
    needs: set[Need] = {"generation", *prompt.media}
    if prompt.token_ids:
        needs.add("token_ids")
    if prompt.several:
        needs.add("prompt_list")
    if NEED_FIELDS.isdisjoint(body):
        return frozenset(needs) if len(needs) > 1 else GENERATION
    if (body.get("n") or 1) > 1 or (body.get("best_of") or 1) > 1:
        needs.add("n")
    if body.get("logprobs") is not None and body["logprobs"] is not False:  # 0 asks for the chosen token's own
        needs.add("logprobs")
    needs.update(field for field in OWN_FIELDS if body.get(field))
    if body.get("json_schema"):
        needs.add("grammar")
    if any(body.get(field) is not None for field in GUIDED):
        needs.add("structured_outputs")
    needs.update(_format_needs(body))
    if endpoint == "chat":
        needs.update(_tool_needs(body))
    return frozenset(needs)


def _format_needs(body: Json) -> Iterator[Need]:
    response_format = body.get("response_format") or {}
    kind = response_format.get("type")
    if kind == "json_schema":
        wrapper = response_format.get("json_schema")
        if not isinstance(wrapper, dict) or not isinstance(wrapper.get("schema") or {}, dict):
            raise BadRequestError("response_format.json_schema must be {name, schema: {…}}", param="response_format")
        yield "json_schema"
    elif kind == "json_object":
        schema = get_field(response_format, "schema", dict, "response_format.schema")
        yield "json_object" if schema is None else "json_schema"
    elif kind == "structural_tag":
        yield "structured_outputs"
    elif kind not in (None, "text"):
        raise BadRequestError(
            f"response_format.type must be text, json_object, json_schema or structural_tag, not {quoted(kind)}",
            param="response_format",
        )


def _tool_needs(body: Json) -> Iterator[Need]:
    choice = get_field(body, "tool_choice", (str, dict))
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise BadRequestError("tool_choice must be none, auto, required or an object", param="tool_choice")
    if not body.get("tools") and not body.get("functions"):
        return
    if isinstance(choice, dict):
        yield "forced_tool"
    elif choice != "none":
        yield "tools"
