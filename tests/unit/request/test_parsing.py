from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Features
from xgen_proxy.request.limits import Limits
from xgen_proxy.request.parsing import parse_features, strip_hints

USER = {"role": "user", "content": "one two three"}


def read(
    body: dict[str, Any], headers: dict[bytes, bytes] | None = None, endpoint: Any = "chat", **limits: int
) -> Features:
    if endpoint == "chat":
        body = {"messages": [USER], **body}
    return parse_features(body, headers or {}, endpoint, Limits(**limits))


def test_features_of_a_plain_request() -> None:
    features = read({"model": "m", "max_tokens": 7, "stream": True, "stream_options": {"include_usage": True}})
    assert features == Features(
        endpoint="chat", model="m", prompt_words=3, prompt_tokens=4, max_tokens=7, stream=True, include_usage=True,
        needs=frozenset({"generation"}), backend=None, urgency="normal", task_type=None, fallback=True,
        continuation=True, hinted=False, session=None, prefix="one two three",
    )  # fmt: skip


def test_null_means_not_set() -> None:
    names = (
        "model",
        "max_tokens",
        "n",
        "stop",
        "tools",
        "stream",
        "stream_options",
        "temperature",
        "logprobs",
        "backend",
    )
    assert read(dict.fromkeys(names)) == read({})


def test_max_completion_tokens_wins() -> None:
    assert read({"max_tokens": 9, "max_completion_tokens": 5}).max_tokens == 5
    assert read({"max_tokens": 9, "max_completion_tokens": None}).max_tokens == 9


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"tools": [TOOL]}, {"tools"}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tools"}),
        ({"tools": [TOOL], "tool_choice": "none"}, set()),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, {"forced_tool"}),
        ({"tools": []}, set()),
        ({"n": 2}, {"n"}),
        ({"n": 1}, set()),
        ({"logprobs": True}, {"logprobs"}),
        ({"logprobs": False}, set()),
        ({"response_format": {"type": "json_object"}}, {"json_object"}),
        ({"response_format": {"type": "text"}}, set()),
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, {"json_schema"}),
        ({"response_format": {"type": "structural_tag", "structures": []}}, {"structured_outputs"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, {"json_schema"}),
        ({"grammar": "root ::= x"}, {"grammar"}),
        ({"json_schema": {"type": "string"}}, {"grammar"}),
        ({"logprobs": 0}, {"logprobs"}),
        ({"structured_outputs": {"choice": ["a"]}}, {"structured_outputs"}),
    ],
)
def test_needs(fields: dict[str, Any], needs: set[str]) -> None:
    assert read(fields).needs == {"generation", *needs}


def test_token_ids_of_embeddings_count_and_a_chats_prompt_does_not() -> None:
    assert read({"input": [1, 2, 3, 4]}, endpoint="embeddings").prompt_tokens == 4
    assert read({"prompt": [1, 2, 3, 4]}) == read({})


def test_embeddings() -> None:
    features = read({"input": ["a b", "c"]}, endpoint="embeddings")
    assert features.needs == {"embeddings"}
    assert features.prompt_words == 3
    for ids in ([1, 2], [[1], [2, 3]]):
        assert read({"input": ids}, endpoint="embeddings").needs == {"embeddings", "token_ids"}


def test_hints_come_from_the_body_or_else_from_headers() -> None:
    headers = {b"x-backend": b"vllm", b"x-urgency": b"high", b"x-task-type": b"code_generation", b"x-fallback": b"none"}
    features = read({}, headers)
    assert (features.backend, features.urgency, features.task_type) == ("vllm", "high", "code_generation")
    assert not features.fallback
    assert features.hinted
    assert read({"backend": "auto", "urgency": "low"}, headers).backend is None
    assert read({"urgency": "low"}, headers).urgency == "low"


def test_a_session_comes_from_the_hint_or_openais_field() -> None:
    assert read({"session_id": "a", "prompt_cache_key": "b"}, {b"x-session-id": b"c"}).session == "a"
    assert read({"prompt_cache_key": "b"}, {b"x-session-id": b"c"}).session == "c"
    assert read({"prompt_cache_key": "b"}).session == "b"


def test_open_webuis_headers_tell_the_chat_and_that_nobody_waits() -> None:
    chat = {b"x-openwebui-chat-id": b"chat-1"}
    assert read({}, chat).session == "chat-1"
    assert read({"prompt_cache_key": "b"}, chat).session == "b"
    assert read({}, {b"x-openwebui-chat-id": b""}).session is None
    assert len(read({}, {b"x-openwebui-chat-id": b"x" * 9000}).session or "") == 512
    task = {b"x-openwebui-task": b"title_generation"}
    assert (read({}, task).urgency, read({}, task).hinted) == ("low", False)
    assert read({"urgency": "high"}, task).urgency == "high"
    for waited_for in (b"", b"query_generation", b"{{TASK}}"):
        assert read({}, {b"x-openwebui-task": waited_for}).urgency == "normal"
    with pytest.raises(BadRequestError, match="prompt_cache_key must be a string"):
        read({"prompt_cache_key": 1})


def test_embeddings_keep_the_fields_of_other_apis() -> None:
    """Jina's and Google's task_type chooses the kind of vector."""
    body = {"input": "a", "task_type": "RETRIEVAL_QUERY", "fallback": True, "backend": "b", "session_id": "s"}
    features = read(body, {b"x-urgency": b"low"}, endpoint="embeddings")
    assert (features.backend, features.session, features.task_type) == ("b", "s", None)
    assert (features.fallback, features.urgency) == (True, "low")
    assert strip_hints(body, "embeddings") == {"input": "a", "task_type": "RETRIEVAL_QUERY", "fallback": True}


def test_a_long_hint_in_a_header_is_refused() -> None:
    with pytest.raises(BadRequestError, match="task_type has 600 characters; the limit is 512"):
        read({}, {b"x-task-type": b"x" * 600})


def test_strip_hints_removes_hints_only() -> None:
    hints = {"backend": "x", "urgency": "high", "task_type": "t", "fallback": "none", "session_id": "s"}
    assert strip_hints({"a": 1, **hints}, "chat") == {"a": 1}
    body = {"a": 1}
    assert strip_hints(body, "chat") is body


CIRCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}

BAD = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
    ({"model": 5}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"top_logprobs": 50}, "top_logprobs"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream_options": 5}, "stream_options"),
    ({"tools": {}}, "tools"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": 5}}, "response_format.schema"),
    ({"urgency": "now"}, "urgency"),
    ({"backend": 5}, "backend"),
    ({"fallback": "no"}, "fallback"),
    ({"fallback": False}, "fallback"),
    ({"json_schema": {"enum": list(range(3000))}}, "json_schema"),
    ({"guided_choice": ["a"] * 3000}, "guided_choice"),
    ({"grammar": 'root ::= "a"' + ' | "abcd"' * 3000}, "grammar"),
    ({"structured_outputs": {"json": '{"enum":[' + '"abcd",' * 3000 + "0]}"}}, "structured_outputs"),
    ({"tools": [{"function": {"name": "f", "parameters": {"enum": list(range(3000))}}}]}, "tools"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": CIRCLE}}}, "response_format"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_bad_requests_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read(fields)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_messages_quote_the_client_in_brief() -> None:
    for fields in ({"urgency": "x" * 9000}, {"response_format": {"type": ["x"] * 9000}}, {"fallback": "x" * 9000}):
        with pytest.raises(BadRequestError) as caught:
            read(fields)
        assert len(caught.value.message) < 200


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(
    st.sampled_from(["messages", "role", "content", "tools", "n", "stream", "type", "text", "model", "prompt"]), c
)))  # fmt: skip
def test_any_json_is_parsed_or_refused(value: Any) -> None:
    for endpoint in ("chat", "completions", "embeddings"):
        for body in ({"messages": value, "prompt": value, "input": value}, value if isinstance(value, dict) else {}):
            with contextlib.suppress(BadRequestError):
                parse_features(body, {}, endpoint, Limits())
