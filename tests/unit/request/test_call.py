from __future__ import annotations

from typing import Any

import orjson
import pytest

from xgen_proxy.config.settings import Routing
from xgen_proxy.errors import BadRequestError, ServiceUnavailableError
from xgen_proxy.request.call import Call, Origin, parse_call
from xgen_proxy.request.features import Endpoint, UsedAlias
from xgen_proxy.request.limits import Limits

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def no_default() -> str:
    raise ServiceUnavailableError("no model is known")


def parse(
    body: dict[str, Any],
    headers: dict[bytes, bytes] | None = None,
    endpoint: Endpoint = "chat",
    continuation: bool = True,
    default_model: Any = no_default,
) -> Call:
    return parse_call(
        Origin("id-1", headers or {}),
        endpoint,
        orjson.dumps(body),
        body,
        limits=Limits(),
        continuation=continuation,
        default_model=default_model,
    )


def test_an_unchanged_body_keeps_the_clients_bytes() -> None:
    call = parse(CHAT)
    assert call.raw == orjson.dumps(CHAT)
    assert (call.id, call.model, call.body, call.trace) == ("id-1", "m", CHAT, b"")


def test_hints_and_presets_change_the_body() -> None:
    call = parse({**CHAT, "urgency": "high", "top_p": 0.5})
    assert call.raw is None
    assert call.body == {**CHAT, "temperature": 0, "top_p": 0.5, "top_k": 1}
    assert call.features.urgency == "high"


def test_the_default_model_is_asked_for_only_if_the_client_names_none() -> None:
    call = parse({"messages": CHAT["messages"]}, default_model=lambda: "fallback")
    assert call.model == call.features.model == "fallback"
    with pytest.raises(ServiceUnavailableError):
        parse({"messages": CHAT["messages"]})


HAIKU = UsedAlias("claude-haiku-4", "claude-haiku-*", "small", "cpu", "low")


def aliased(body: dict[str, Any], headers: dict[bytes, bytes] | None = None, named: str = "claude-haiku-4") -> Call:
    return parse_call(
        Origin("id-1", headers or {}),
        "chat",
        orjson.dumps(body),
        body,
        limits=Limits(),
        continuation=True,
        default_model=lambda: named,
        find_alias=lambda name: HAIKU if name.startswith("claude-haiku-") else None,
    )


def test_an_alias_is_resolved_once_and_its_name_is_kept_for_the_answer() -> None:
    call = aliased({**CHAT, "model": "claude-haiku-4"})
    assert (call.model, call.features.model, call.asked) == ("small", "small", "claude-haiku-4")
    assert call.features.alias == HAIKU
    assert call.features.urgency == "low"
    assert not call.features.hinted, "no preset may change what the client asks for"
    assert call.raw is not None
    plain = aliased({**CHAT, "model": "small"})
    assert (plain.model, plain.asked, plain.features.alias) == ("small", "small", None)


def test_the_default_model_may_be_an_alias() -> None:
    call = aliased({"messages": CHAT["messages"]})
    assert (call.model, call.asked) == ("small", "claude-haiku-4")
    assert call.features.alias == HAIKU


@pytest.mark.parametrize(
    ("fields", "headers"), [({"urgency": "normal"}, {}), ({}, {b"x-urgency": b"normal"}), ({"urgency": "high"}, {})]
)
def test_an_urgency_of_the_clients_own_wins(fields: dict[str, Any], headers: dict[bytes, bytes]) -> None:
    call = aliased({**CHAT, "model": "claude-haiku-4", **fields}, headers)
    assert call.features.urgency == fields.get("urgency", "normal")


@pytest.mark.parametrize(
    ("fields", "believed"),
    [
        ({}, True),
        ({"max_tokens": 4096}, True),
        ({"max_tokens": 8191}, True),
        ({"max_tokens": 8192}, False),
        ({"max_tokens": 32_000}, False),
        ({"max_completion_tokens": 32_000}, False),
        ({"max_completion_tokens": 100, "max_tokens": 32_000}, True),
    ],
)
def test_what_a_client_always_sends_is_not_believed(fields: dict[str, Any], believed: bool) -> None:
    body = {**CHAT, **fields}
    believed_below = Routing().max_tokens_believed_below
    call = parse_call(
        Origin("id-1", {}),
        "chat",
        orjson.dumps(body),
        body,
        limits=Limits(),
        continuation=True,
        default_model=no_default,
        believed_below=believed_below,
    )
    assert call.features.max_tokens_believed is believed
    assert call.raw is not None, "it reaches the backend as it came"


PARENT = b"00-" + b"0af7651916cd43dd8448eb211c80319c" + b"-b7ad6b7169203331-01"


@pytest.mark.parametrize(("setting", "hint"), [(True, None), (True, "none"), (False, None), (False, "auto")])
def test_continuation_needs_the_setting_and_the_client(setting: bool, hint: str | None) -> None:
    body = CHAT if hint is None else {**CHAT, "continuation": hint}
    assert parse(body, continuation=setting).features.continuation == (setting and hint != "none")


def test_the_trace_context_is_kept_as_header_lines() -> None:
    parent = {b"traceparent": PARENT}
    assert parse(CHAT, parent).trace == b"traceparent: " + PARENT + b"\r\n"
    assert parse(CHAT, {**parent, b"tracestate": b"a=1"}).trace.endswith(b"\r\ntracestate: a=1\r\n")
    assert parse(CHAT, {b"tracestate": b"a=1"}).trace == b""


@pytest.mark.parametrize(
    "parent", [b"", b"\xff", b"00-1-2-01", PARENT + b"\xff", PARENT + b"\n", PARENT.upper(), b"0" * 60_000]
)
def test_a_malformed_trace_context_is_dropped(parent: bytes) -> None:
    """uvicorn and others close the connection at bytes that are no text, which would count against the replica."""
    assert parse(CHAT, {b"traceparent": parent, b"tracestate": b"a=1"}).trace == b""


@pytest.mark.parametrize("state", [b"\xff", b"a=\x01", b"a" * 513])
def test_a_malformed_trace_state_is_dropped(state: bytes) -> None:
    trace = parse(CHAT, {b"traceparent": PARENT, b"tracestate": state}).trace
    assert trace == b"traceparent: " + PARENT + b"\r\n"


def test_a_wrong_body_raises() -> None:
    with pytest.raises(BadRequestError, match="messages is missing"):
        parse({"model": "m"})


def test_a_corrected_body_is_not_the_clients_bytes() -> None:
    call = parse({**CHAT, "tools": [], "max_tokens": 5.0})
    assert (call.raw, call.body) == (None, {**CHAT, "max_tokens": 5})
    assert call.features.max_tokens == 5
    assert parse({**CHAT, "n_predict": 2000}).features.max_tokens == 2000
    assert parse({**CHAT, "max_tokens": -1}).features.max_tokens is None


def test_embeddings_keep_fields_that_are_hints_elsewhere() -> None:
    call = parse({"model": "m", "input": "a", "task_type": "x", "backend": "b"}, endpoint="embeddings")
    assert call.body == {"model": "m", "input": "a", "task_type": "x"}
