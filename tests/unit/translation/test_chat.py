"""What chat completions say, as pieces and as whole answers."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.support.chunks import ANSWER, delta, events
from xgen_proxy import sse
from xgen_proxy.errors import BadGatewayError, BadRequestError
from xgen_proxy.translation.chat import (
    Answer,
    Failure,
    Finish,
    Reasoning,
    Text,
    ToolCall,
    ToolCallPiece,
    Usage,
    read_answer,
    read_pieces,
)


def call(index: int, arguments: str, **head: str) -> dict[str, Any]:
    name = {"name": head["name"]} if "name" in head else {}
    return {
        "index": index,
        **({"id": head["id"]} if "id" in head else {}),
        "function": {**name, "arguments": arguments},
    }


@pytest.mark.parametrize(
    ("chunk", "pieces"),
    [
        (delta(role="assistant", content=""), []),
        (delta(content="Hi"), [Text("Hi")]),
        (delta(refusal="No"), [Text("No")]),
        (delta(reasoning="Hm"), [Reasoning("Hm")]),
        (delta(reasoning_content="Hm"), [Reasoning("Hm")]),
        (delta(content="!", finish="stop"), [Text("!"), Finish("stop")]),
        (delta(tool_calls=[call(0, "", id="a", name="f")]), [ToolCallPiece(0, "a", "f", "")]),
        (
            delta(tool_calls=[call(0, '{"x"'), call(1, "{}", id="b", name="g")], finish="tool_calls"),
            [ToolCallPiece(0, "", "", '{"x"'), ToolCallPiece(1, "b", "g", "{}"), Finish("tool_calls")],
        ),
        ({**delta(), "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, [Usage(3, 2)]),
    ],
)
def test_a_chunk_becomes_pieces(chunk: dict[str, Any], pieces: list[Any]) -> None:
    assert list(read_pieces(events(chunk))) == pieces


def test_vllm_tells_the_stop_string_but_not_a_token() -> None:
    chunk = delta(finish="stop")
    chunk["choices"][0]["stop_reason"] = "END"
    assert list(read_pieces(events(chunk))) == [Finish("stop", "END")]
    chunk["choices"][0]["stop_reason"] = 151645
    assert list(read_pieces(events(chunk))) == [Finish("stop")]


def test_probabilities_of_tokens() -> None:
    token = {"token": "Hi", "logprob": -0.5, "bytes": None, "top_logprobs": []}
    chunk = delta(content="Hi")
    chunk["choices"][0]["logprobs"] = {"content": [token]}
    assert list(read_pieces(events(chunk))) == [Text("Hi", (token,))]
    choice = {"message": {"content": "Hi"}, "logprobs": {"content": [token]}, "finish_reason": "stop"}
    assert read_answer(orjson.dumps({"choices": [choice]})).logprobs == (token,)


def test_an_error_is_a_failure() -> None:
    failed = {"message": "no", "type": "invalid_request_error", "param": None, "code": "c"}
    assert list(read_pieces(BadRequestError("no", code="c").event())) == [Failure(failed)]


def test_comments_and_done_say_nothing() -> None:
    assert list(read_pieces(sse.comment("resumed on b") + sse.DONE)) == []


def test_a_whole_answer() -> None:
    usage = {
        "prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details": {"reasoning_tokens": 3},
    }  # fmt: skip
    message = {
        "role": "assistant", "content": None, "reasoning": "Hm",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }  # fmt: skip
    data = orjson.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage})
    expected = Answer("", "Hm", (ToolCall("a", "f", "{}"),), Finish("tool_calls"), Usage(9, 4, 8, 3))
    assert read_answer(data) == expected


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{"message":null}]}'])
def test_what_is_no_chat_completion_is_the_backends_fault(data: bytes) -> None:
    with pytest.raises(BadGatewayError, match="not a chat completion"):
        read_answer(data)


def test_a_tool_call_without_arguments_is_the_backends_fault() -> None:
    with pytest.raises(BadGatewayError, match="not a chat completion"):
        read_answer(orjson.dumps(ANSWER))
