"""Requests to /v1/responses as chat completions."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.documents import ROOT
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.call import Origin, parse_call
from xgen_proxy.request.limits import Limits
from xgen_proxy.translation.responses.request import read_request

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}
TOOL_CHAT = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}

# (what the client sends, what the chat has beside its messages)
FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"model": "m", "temperature": 0.5, "top_p": 0.9, "user": "u"},
     {"model": "m", "temperature": 0.5, "top_p": 0.9, "user": "u"}),
    ({"model": None, "temperature": None}, {}),
    ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
    ({"stream": True, "stream_options": {"include_obfuscation": False}},
     {"stream": True, "stream_options": {"include_usage": True}}),
    ({"stream": False}, {"stream": False}),
    ({"max_output_tokens": 100}, {"max_completion_tokens": 100}),
    ({"max_output_tokens": 100.0}, {"max_completion_tokens": 100}),
    ({"prompt_cache_key": "thread-1"}, {"prompt_cache_key": "thread-1"}),
    ({"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
     {"tools": [TOOL_CHAT], "tool_choice": "auto", "parallel_tool_calls": False}),
    ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
    ({"text": {"format": {"type": "text"}}}, {}),
    ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    ({"text": {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": SCHEMA}}},
     {"response_format": AS_SCHEMA}),
    ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
    ({"reasoning": None, "text": None, "include": None}, {}),
    ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
    ({"include": ["reasoning.encrypted_content"], "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"top_logprobs": 0}, {}),
    ({"store": False, "metadata": {"a": "b"}, "safety_identifier": "x", "client_metadata": {}, "background": False,
      "previous_response_id": None, "conversation": None, "prompt": None}, {}),
    ({"urgency": "high", "session_id": "s", "top_k": 5, "chat_template_kwargs": {"enable_thinking": False}},
     {"urgency": "high", "session_id": "s", "top_k": 5, "chat_template_kwargs": {"enable_thinking": False}}),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "chat"), FIELDS)
def test_fields(sent: dict[str, Any], chat: dict[str, Any]) -> None:
    request = read_request({"input": "Hi", **sent})
    assert request.body == {"messages": [USER], **chat}
    assert request.dropped == ()


@pytest.mark.parametrize(
    ("sent", "dropped"),
    [
        ({"tools": [TOOL, {"type": "web_search"}]}, ("web_search",)),
        ({"truncation": "auto"}, ("truncation",)),
        ({"store": True}, ("store",)),
        ({"truncation": "disabled", "service_tier": "auto"}, ()),
        ({"service_tier": "priority", "max_tool_calls": 3}, ("service_tier", "max_tool_calls")),
        ({"text": {"verbosity": "low"}}, ("text.verbosity",)),
        ({"text": {"verbosity": "medium"}}, ()),
        ({"n": 2, "max_tokens": 5}, ("max_tokens", "n")),
        ({"n_cmpl": 2, "n_predict": 5}, ("n_cmpl", "n_predict")),
        ({"input": [USER, {"type": "web_search_call"}]}, ("web_search_call",)),
    ],
)
def test_what_is_not_heeded_is_told(sent: dict[str, Any], dropped: tuple[str, ...]) -> None:
    request = read_request({"input": "Hi", **sent})
    assert request.dropped == dropped
    assert request.body["messages"] == [USER]
    assert not {"n", "n_cmpl", "max_tokens", "n_predict", "truncation", "service_tier"} & request.body.keys()


@pytest.mark.parametrize(
    ("sent", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps nothing; send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"prompt": {"id": "p"}}, "prompt", "send the prompt's text"),
        ({"store": "yes"}, "store", "true or false"),
        ({"background": True}, "background", "wait for the answer, or send stream: true"),
        ({"max_output_tokens": 0}, "max_output_tokens", "a whole number between 1"),
        ({"max_output_tokens": "100"}, "max_output_tokens", "a whole number"),
        ({"top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"text": "x"}, "text", "must be an object"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema, not 'xml'"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "is missing"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "one of none, minimal"),
        ({"tools": [TOOL], "parallel_tool_calls": "yes"}, "parallel_tool_calls", "true or false"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(sent: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequestError, match=words) as refused:
        read_request({"input": "Hi", **sent})
    assert refused.value.param == param


def codex(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "tests" / "fixtures" / f"codex_{name}.json").read_text()))


def test_what_codex_sends_with_freeform_tools() -> None:
    sent = codex("request")
    request = read_request(sent)
    roles = [message["role"] for message in request.body["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert request.body["messages"][0]["content"].startswith(sent["instructions"])
    names = [tool["function"]["name"] for tool in request.body["tools"]]
    assert names == ["exec_command", "write_stdin", "update_plan", "apply_patch", "view_image", "mcp__git__git_status"]
    assert request.dropped == ("web_search",)


def test_what_codex_exec_sends_to_a_model_that_it_does_not_know() -> None:
    """Recorded from Codex 0.169 after its first call, with long texts cut."""
    sent = codex("exec_request")
    request = read_request(sent)
    assert [message["role"] for message in request.body["messages"]] == ["system", "user", "assistant", "tool"]
    thought, called = request.body["messages"][2]["reasoning"], request.body["messages"][2]["tool_calls"][0]
    assert (thought, called["function"]["name"]) == ("I will make it.", "exec_command")
    names = [tool["function"]["name"] for tool in request.body["tools"]]
    assert names[:2] == ["exec_command", "write_stdin"]
    assert "multi_agent_v1__spawn_agent" in names
    assert request.dropped == ("web_search",)
    raw = orjson.dumps(request.body)
    call = parse_call(
        Origin("id-1", {}), "chat", raw, request.body, limits=Limits(), continuation=True, default_model=lambda: "m"
    )
    assert call.features.session == sent["prompt_cache_key"]
    assert "tools" in call.features.needs


WORDS = st.sampled_from([
    "type", "role", "content", "input", "tools", "tool_choice", "text", "format", "name", "namespace", "function",
    "custom", "message", "reasoning", "function_call", "function_call_output", "output", "call_id", "arguments", "user",
    "input_text", "input_image", "image_url", "system", "schema", "json_schema", "allowed_tools", "mode", "include",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(WORDS, VALUES, max_size=5))
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    with contextlib.suppress(BadRequestError):
        orjson.dumps(read_request(body).body)
