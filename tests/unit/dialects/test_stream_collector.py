"""A stream collected into the whole response."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import LLAMA_CPP_PYTHON, LLAMA_SERVER, TOOLS, Replica, call, delta, events, make_request, text
from xgen_proxy.dialects import stream_collector
from xgen_proxy.errors import UpstreamOversizedError, UpstreamProtocolError
from xgen_proxy.request.features import Json

USAGE = {"prompt_tokens": 37, "completion_tokens": 3, "total_tokens": 40}


def usage(**fields: Any) -> Json:
    return {**delta(), "choices": [], "usage": USAGE, **fields}


async def collected(*chunks: Json, dialect: Any = LLAMA_SERVER, endpoint: Any = "chat", **fields: Any) -> Json:
    collector = dialect.stream_collector(make_request(endpoint, alias="public", **fields))
    for chunk in chunks:
        collector.feed(events(chunk))
    await collector.finish(Replica().post)
    return dict(collector.result())


async def test_a_chat() -> None:
    timings = {"predicted_n": 3}
    answer = await collected(
        delta(role="assistant", content=None), delta(content="Hel"), delta(content="lo"), delta("stop"),
        usage(timings=timings, system_fingerprint="b1"),
    )  # fmt: skip
    assert answer == {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "public", "system_fingerprint": "b1",
        "timings": timings, "usage": USAGE,
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "Hello"}, "logprobs": None, "finish_reason": "stop",
        }],
    }  # fmt: skip


async def test_a_completion() -> None:
    answer = await collected(text("a"), text("b"), {**text("", "length"), "usage": USAGE}, endpoint="completions")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"text": "ab", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == USAGE


async def test_an_empty_answer() -> None:
    answer = await collected(delta("stop", role="assistant"), usage())
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ""}


async def test_reasoning_and_refusal() -> None:
    answer = await collected(
        delta(reasoning_content="hm"), delta(reasoning_content="m"), delta(refusal="no"), delta("stop"), usage()
    )
    message = {"role": "assistant", "content": "", "reasoning": "hmm", "refusal": "no"}
    assert answer["choices"][0]["message"] == message


async def test_tool_calls_are_joined_by_index() -> None:
    def piece(index: int, arguments: str, **names: Any) -> Json:
        function = {"arguments": arguments, **({"name": names["name"]} if names else {})}
        return {"index": index, "function": function, **({"id": names["id"], "type": "function"} if names else {})}

    answer = await collected(
        delta(tool_calls=[piece(0, "", id="a", name="f")]), delta(tool_calls=[piece(1, "{", id="b", name="g")]),
        delta(tool_calls=[piece(0, "{}"), piece(1, "}")]), delta("tool_calls"), usage(),
    )  # fmt: skip
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


async def test_several_choices_in_any_order() -> None:
    answer = await collected(
        delta(index=1, content="b"), delta(content="a"), delta("stop", 1), usage(), delta("length"), usage(), n=2
    )
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "b"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "stop"]
    assert answer["usage"] == {"prompt_tokens": 37, "completion_tokens": 6, "total_tokens": 43}


async def test_logprobs_are_joined() -> None:
    def logprobs(token: str) -> Json:
        return {"content": [{"token": token, "logprob": -1.0, "top_logprobs": []}], "refusal": None}

    pieces = [delta(content="a"), delta(content="b"), delta("stop")]
    for piece, token in zip(pieces, "ab", strict=False):
        piece["choices"][0]["logprobs"] = logprobs(token)
    answer = await collected(*pieces, usage(), logprobs=True)
    joined = answer["choices"][0]["logprobs"]
    assert [each["token"] for each in joined["content"]] == ["a", "b"]
    assert joined["refusal"] is None


async def test_logprobs_of_a_completion_get_the_legacy_shape() -> None:
    logprobs = {"content": [{"token": "ab", "logprob": -1.0, "top_logprobs": [{"token": "x", "logprob": -2.0}]}]}
    answer = await collected(
        text("ab", logprobs=logprobs), text("ab", logprobs=logprobs), text("", "stop"), usage(), endpoint="completions"
    )
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["ab", "ab"], "token_logprobs": [-1.0, -1.0], "top_logprobs": [{"x": -2.0}] * 2,
        "text_offset": [0, 2],
    }  # fmt: skip


async def test_llama_cpp_python_is_counted() -> None:
    answer = await collected(
        delta(role="assistant"), delta(content="a"), delta(content="b"), delta("stop"), dialect=LLAMA_CPP_PYTHON
    )
    assert answer["usage"] == {"prompt_tokens": 37, "completion_tokens": 2, "total_tokens": 39}


async def test_a_forced_call_of_llama_cpp_python() -> None:
    answer = await collected(
        call("{"), call("}"), call(""), delta("tool_calls"), dialect=LLAMA_CPP_PYTHON, **TOOLS
    )  # fmt: skip
    function = {"name": "f", "arguments": "{}"}
    assert answer["choices"][0]["message"] == {
        "role": "assistant", "content": None, "function_call": function,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }  # fmt: skip


async def test_a_stop_string_ends_it() -> None:
    collector = LLAMA_CPP_PYTHON.stream_collector(make_request(stop=["X"]))
    collector.feed(events(delta(role="assistant"), delta(content="a")))
    assert not collector.done
    collector.feed(events(delta(content="bX"), delta(content="c")))
    assert collector.done
    await collector.finish(Replica().post)
    answer = collector.result()
    assert answer["choices"][0]["message"]["content"] == "ab"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


def test_stop_strings_are_llama_servers_own_business() -> None:
    collector = LLAMA_SERVER.stream_collector(make_request(stop=["X"]))
    collector.feed(events(delta(content="aX")))
    assert not collector.done


@pytest.mark.parametrize(
    "chunks",
    [[], [delta(content="a")], [delta("abort")], [delta("stop")] * 2],
    ids=["nothing", "no finish", "abort", "one of two"],
)
async def test_a_stream_without_its_finish_reasons_has_failed(chunks: list[Json]) -> None:
    with pytest.raises(UpstreamProtocolError, match="finish_reason"):
        await collected(*chunks, n=2 if len(chunks) == 2 else 1)


@given(st.lists(st.text(max_size=5), max_size=10))
async def test_no_character_is_lost(pieces: list[str]) -> None:
    answer = await collected(*[delta(content=piece) for piece in pieces], delta("stop"), usage())
    assert answer["choices"][0]["message"]["content"] == "".join(pieces)


async def test_an_endless_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_collector, "LIMIT", 1000)
    collector = LLAMA_SERVER.stream_collector(make_request())
    for _ in range(3):
        collector.feed(events(delta(content="a" * 100)))
    with pytest.raises(UpstreamOversizedError, match="more than 1000 bytes"):
        collector.feed(events(delta(content="a" * 100)))
