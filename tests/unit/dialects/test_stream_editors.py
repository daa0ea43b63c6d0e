"""What is put right in streams, what is counted in them, and whole answers told as streams."""

from __future__ import annotations

import base64
import struct
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import delta, events, make_request, text
from xgen_proxy.dialects.dialect import LLAMA_CPP_PYTHON, LLAMA_SERVER, OPENAI, VLLM, Json
from xgen_proxy.dialects.llama_cpp_python.stop_strings import StopStringCutter, stop_strings, text_of
from xgen_proxy.dialects.llama_cpp_python.token_usage import TokenCounter
from xgen_proxy.dialects.stream_editors import chunks, editor_for
from xgen_proxy.dialects.whole_response import as_events, repair_whole
from xgen_proxy.errors import RequestRejectedError, UpstreamProtocolError

QUIET: dict[str, Any] = {}
ASKED: dict[str, Any] = {"stream_options": {"include_usage": True}}


class Replica:
    """Answers the questions that are asked after a stream: a token for each character, and 37 for the prompt."""

    def __init__(self, status: int = 200, before: int = 0) -> None:
        self.status = status
        self.before = before  # tokens that the tokenizer puts before any text
        self.asked: list[tuple[str, Json]] = []

    async def post(self, path: str, body: Json) -> tuple[int, Any]:
        self.asked.append((path, body))
        if path == "/extras/tokenize/count":
            return self.status, {"count": self.before + len(body["input"])}
        return self.status, {"usage": {"prompt_tokens": 37, "completion_tokens": 1, "total_tokens": 38}}


def read(block: bytes) -> list[Json]:
    return list(chunks(block))


# vLLM and others: bytes


@pytest.mark.parametrize("dialect", [VLLM, OPENAI], ids=lambda dialect: dialect.name)
async def test_the_public_name_in_each_chunk(dialect: Any) -> None:
    assert editor_for(dialect, make_request(stream=True)) is None
    editor = editor_for(dialect, make_request(stream=True, alias='pub"lic', served="m"))
    assert editor is not None
    assert not editor.done
    block = events(delta(content='said "model":"m"'), delta("stop"))
    edited = read(editor.edit(block))
    assert [chunk["model"] for chunk in edited] == ['pub"lic', 'pub"lic']
    assert edited[0]["choices"][0]["delta"]["content"] == 'said "model":"m"'
    assert await editor.finish(Replica().post) == b""


# llama-server


async def test_llama_server_has_one_created_and_a_role() -> None:
    editor = editor_for(LLAMA_SERVER, make_request(stream=True, alias="public"))
    assert editor is not None
    first = {**delta(content="😀"), "created": 7}
    out = read(editor.edit(events(first))) + read(editor.edit(events({**delta("stop"), "created": 8})))
    assert [chunk["created"] for chunk in out] == [7, 7, 7]
    assert {chunk["model"] for chunk in out} == {"public"}
    assert out[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert out[0]["choices"][0]["finish_reason"] is None
    assert out[1]["choices"][0]["delta"] == {"content": "😀"}
    assert await editor.finish(Replica().post) == b""


def test_llama_server_needs_no_second_role() -> None:
    editor = editor_for(LLAMA_SERVER, make_request(stream=True))
    assert editor is not None
    block = events(delta(role="assistant", content=None), delta(content="a"))
    assert editor.edit(block) == block
    assert not editor.done


async def test_llama_server_usage_of_several_choices() -> None:
    request = make_request(stream=True, n=2, stream_options={"include_usage": True})
    editor = editor_for(LLAMA_SERVER, request)
    assert editor is not None
    usage = {"completion_tokens": 3, "prompt_tokens": 37, "total_tokens": 40}
    ended = {**delta(), "choices": [], "usage": usage}
    block = b"data: null\n\n" + events(delta(role="assistant"), delta("stop", 1), ended, delta("stop", 0), ended)
    out = read(editor.edit(block))
    roles = [choice["index"] for chunk in out for choice in chunk["choices"] if "role" in choice["delta"]]
    assert (len(out), roles) == (4, [0, 1])
    assert not any("usage" in chunk for chunk in out)
    [last] = read(await editor.finish(Replica().post))
    assert last["choices"] == []
    assert last["usage"] == {"completion_tokens": 6, "prompt_tokens": 37, "total_tokens": 43}


async def test_llama_server_usage_of_a_completion_comes_where_asked() -> None:
    usage = {"completion_tokens": 3, "prompt_tokens": 4, "total_tokens": 7}
    for options, expected in (QUIET, []), (ASKED, [usage]):
        editor = editor_for(LLAMA_SERVER, make_request("completions", stream=True, **options))
        assert editor is not None
        out = read(editor.edit(events(text("a"), {**text("", "length"), "usage": usage})))
        assert [chunk["choices"][0]["text"] for chunk in out] == ["a", ""]
        assert not any("usage" in chunk for chunk in out)
        tail = read(await editor.finish(Replica().post))
        assert [chunk["usage"] for chunk in tail] == expected
        assert [chunk["choices"] for chunk in tail] == [[] for _ in expected]


def test_llama_server_legacy_logprobs() -> None:
    def chat_shape(token: str) -> Json:
        return {"content": [{"token": token, "logprob": -1.0, "top_logprobs": [{"token": token, "logprob": -1.0}]}]}

    request = make_request("completions", stream=True, logprobs=1, prompt=["a", "b"])
    editor = editor_for(LLAMA_SERVER, request)
    assert editor is not None
    pieces = [text("ab", logprobs=chat_shape("ab")), text("x", index=1, logprobs=chat_shape("x")),
              text("c", logprobs=chat_shape("c")), text("", "stop")]  # fmt: skip
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in read(editor.edit(events(*pieces)))]
    assert logprobs[0] == {
        "tokens": ["ab"], "token_logprobs": [-1.0], "top_logprobs": [{"ab": -1.0}], "text_offset": [0],
    }  # fmt: skip
    assert [each["text_offset"] for each in logprobs[:3]] == [[0], [0], [2]]
    assert logprobs[3] is None


# llama-cpp-python


async def test_llama_cpp_python_usage_is_added_where_asked() -> None:
    for options, expected in (QUIET, b""), (ASKED, None):
        editor = editor_for(LLAMA_CPP_PYTHON, make_request(stream=True, alias="public", **options))
        assert editor is not None
        out = read(editor.edit(events(delta(role="assistant"), delta(content="a"), delta("stop"))))
        assert {chunk["model"] for chunk in out} == {"public"}
        tail = await editor.finish(Replica().post)
        if expected is None:
            [last] = read(tail)
            assert last["usage"] == {"prompt_tokens": 37, "completion_tokens": 1, "total_tokens": 38}
            assert (last["choices"], last["id"], last["model"]) == ([], "chatcmpl-1", "public")
        else:
            assert tail == expected


def call(arguments: str) -> Json:
    function = {"name": "f", "arguments": arguments}
    return delta(
        role=None, content=None, function_call=function,
        tool_calls=[{"index": 0, "id": "call_1", "type": "function", "function": dict(function)}],
    )  # fmt: skip


TOOLS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
}


def test_llama_cpp_python_names_a_call_once() -> None:
    editor = editor_for(LLAMA_CPP_PYTHON, make_request(stream=True, **TOOLS))
    assert editor is not None
    out = read(editor.edit(events(call("{"), call("}"), call(""), delta("tool_calls"))))
    deltas = [chunk["choices"][0]["delta"] for chunk in out]
    assert deltas[0] == {
        "tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}}]
    }
    assert deltas[1] == {"tool_calls": [{"index": 0, "type": "function", "function": {"arguments": "}"}}]}
    assert deltas[3] == {}


def test_llama_cpp_python_stops_itself() -> None:
    editor = editor_for(LLAMA_CPP_PYTHON, make_request(stream=True, stop="STOP"))
    assert editor is not None
    out = read(editor.edit(events(delta(role="assistant"), delta(content="a S"), delta(content="TO"))))
    assert not editor.done
    out += read(editor.edit(events(delta(content="P b"), delta(content="c"))))
    assert editor.done
    assert "".join(text_of(chunk["choices"][0]) or "" for chunk in out) == "a "
    assert out[-1]["choices"][0]["finish_reason"] == "stop"
    assert editor.edit(events(delta(content="d"))) == b""


@pytest.mark.parametrize("block", [b"data: {\n\n", b"data: 5\n\n", b'data: {"a": 1}\n\n'])
def test_nonsense_is_the_backends_fault(block: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        read(block)


# Stop strings


def stopped(pieces: list[str], strings: tuple[str, ...], finish: str = "length") -> tuple[str, str | None]:
    stops = StopStringCutter(strings)
    out = [cut for piece in pieces for cut in stops.cut(text(piece))]
    out += list(stops.cut(text("", finish)))
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in out if chunk["choices"][0]["finish_reason"]]
    assert len(reasons) == 1
    assert out[-1]["choices"][0]["finish_reason"] == reasons[0]
    return "".join(chunk["choices"][0]["text"] for chunk in out), reasons[0]


PIECES = st.lists(st.text("abc", min_size=1, max_size=3), max_size=8)
STRINGS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(PIECES, STRINGS)
def test_stop_strings_cut_as_llama_cpp_python_cuts(pieces: list[str], strings: list[str]) -> None:
    """After each token it looks for each of the strings in all of the text so far."""
    expected = "".join(pieces), "length"
    for count in range(1, len(pieces) + 1):
        so_far = "".join(pieces[:count])
        found = [string for string in strings if string in so_far]
        if found:
            expected = so_far[: so_far.index(found[0])], "stop"
            break
    assert stopped(pieces, tuple(strings)) == expected


def test_stop_strings_of_a_request() -> None:
    assert stop_strings({}) == ()
    assert stop_strings({"stop": None}) == ()
    assert stop_strings({"stop": ""}) == ()
    assert stop_strings({"stop": "a"}) == ("a",)
    assert stop_strings({"stop": ["a", "", "b"]}) == ("a", "b")


def test_a_stop_string_in_the_arguments_of_a_call() -> None:
    stops = StopStringCutter(("X",))
    out = [cut for chunk in (call('{"a'), call('X"}')) for cut in stops.cut(chunk)]
    assert "".join(text_of(chunk["choices"][0]) or "" for chunk in out) == '{"a'
    assert out[1]["choices"][0]["delta"]["function_call"]["arguments"] == ""
    assert out[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_what_was_held_back_comes_at_the_end() -> None:
    stops = StopStringCutter(("ab",))
    chat = [delta(role="assistant"), delta(content="xa"), delta("length")]
    out = [cut for chunk in chat for cut in stops.cut(chunk)]
    assert [text_of(chunk["choices"][0]) for chunk in out] == [None, "x", "a", None]
    assert list(stops.cut({"choices": []})) == [{"choices": []}]


# Counting


async def counted(*pieces: Json, endpoint: Any = "chat", replica: Replica | None = None, **fields: Any) -> Json:
    tally = TokenCounter(make_request(endpoint, **fields))
    for piece in pieces:
        tally.add(piece)
    return await tally.usage((replica or Replica()).post)


async def test_a_chunk_of_ascii_is_a_token() -> None:
    pieces = [delta(role="assistant"), delta(content="a"), delta(content="bcd"), delta(content=""), delta("stop")]
    assert await counted(*pieces) == {"prompt_tokens": 37, "completion_tokens": 3, "total_tokens": 40}


async def test_other_text_is_tokenized_in_stretches() -> None:
    replica = Replica(before=1)
    pieces = [delta(content=piece) for piece in ("a", "안", "녕하", " b", "😀", "")]
    usage = await counted(*pieces, replica=replica)
    assert usage["completion_tokens"] == 1 + 3 + 1 + 1 + 1
    assert [body["input"] for path, body in replica.asked if "tokenize" in path] == ["안녕하", "", "😀", ""]


async def test_never_fewer_tokens_than_chunks() -> None:
    class Odd(Replica):
        async def post(self, path: str, body: Json) -> tuple[int, Any]:
            return (200, {"count": 0}) if "tokenize" in path else await super().post(path, body)

    assert (await counted(delta(content="é"), delta(content="é"), replica=Odd()))["completion_tokens"] == 2


async def test_logprobs_come_a_token_each() -> None:
    usage = await counted(delta(content="안"), delta(content=""), logprobs=True)
    assert usage["completion_tokens"] == 2


async def test_the_closing_chunk_of_a_call_is_no_token() -> None:
    usage = await counted(call("{"), call("}"), call(""), delta("tool_calls"), **TOOLS)
    assert usage["completion_tokens"] == 2


async def test_a_completions_prompt_is_tokenized_and_its_cache_kept() -> None:
    replica = Replica()
    usage = await counted(text("a"), text("", "stop"), endpoint="completions", prompt="Once", replica=replica)
    assert usage == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
    assert {path for path, _ in replica.asked} == {"/extras/tokenize/count"}


async def test_a_chats_prompt_is_asked_again_with_all_that_its_template_reads() -> None:
    replica = Replica()
    await counted(replica=replica, stop=["a"], response_format={"type": "json_object"}, **TOOLS)
    [(path, body)] = replica.asked
    assert path == "/v1/chat/completions"
    assert set(body) == {"model", "messages", "tools", "tool_choice", "max_tokens"}
    assert body["max_tokens"] == 1


class Template(Replica):
    """Refuses chats of 50 tokens or more. Its template makes 7 tokens of its own, a character is a token, as is each
    word that is added; `odd` of them appear from nowhere."""

    def __init__(self, odd: int = 0) -> None:
        super().__init__()
        self.odd = odd

    async def post(self, path: str, body: Json) -> tuple[int, Any]:
        text, *words = body["messages"][-1]["content"].split(" word")
        count = 7 + len(text) + len(words) + (self.odd if len(words) > 50 else 0)
        self.asked.append((path, body))
        if count < 50:
            return 200, {"usage": {"prompt_tokens": count}}
        return 400, {"error": {"message": f"you requested {count + 1} tokens ({count} in the messages, 1 in …)"}}


async def test_a_chats_prompt_is_counted_by_being_refused() -> None:
    replica = Template()
    usage = await counted(delta(content="a"), replica=replica, context=50)
    assert usage["prompt_tokens"] == 9
    assert [len(body["messages"][0]["content"]) for _, body in replica.asked] == [2 + 5 * 50, 2 + 10 * 50]


@pytest.mark.parametrize(
    ("replica", "content"), [(Template(), "Hi "), (Template(), ""), (Template(odd=1), "Hi"), (Replica(), "Hi")]
)
async def test_where_it_is_not_refused_as_expected_it_is_asked(replica: Replica, content: str) -> None:
    usage = await counted(replica=replica, context=50, messages=[{"role": "user", "content": content}])
    assert usage["prompt_tokens"] == (37 if type(replica) is Replica else 7 + len(content))
    assert replica.asked[-1][1]["messages"] == [{"role": "user", "content": content}]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_counting_may_fail(endpoint: Any) -> None:
    with pytest.raises(UpstreamProtocolError):
        await counted(endpoint=endpoint, replica=Replica(status=500))


# Whole answers

CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {}}]}
ANSWER = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "m",
    "choices": [{
        "index": 0,
        "message": CALLED,
        "logprobs": {"content": []},
        "finish_reason": "tool_calls",
    }],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}  # fmt: skip


def test_a_whole_chat_told_as_a_stream() -> None:
    request = make_request(stream=True, stream_options={"include_usage": True}, logprobs=True)
    first, closing, last = read(as_events(request, orjson.dumps(ANSWER)))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["choices"][0]["delta"]["tool_calls"][0]["index"] == 0
    assert first["choices"][0]["logprobs"] == {"content": []}
    assert closing["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}]
    assert last["usage"] == ANSWER["usage"]
    assert len(read(as_events(make_request(stream=True), orjson.dumps(ANSWER)))) == 2


def test_a_whole_completion_told_as_a_stream() -> None:
    answer = {**text("One two", "length"), "usage": {}}
    [chunk] = read(as_events(make_request("completions", stream=True, echo=True), orjson.dumps(answer)))
    assert chunk["choices"] == answer["choices"]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}"])
def test_a_whole_answer_that_is_none(data: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        as_events(make_request(stream=True), data)
    with pytest.raises(UpstreamProtocolError):
        repair_whole(LLAMA_CPP_PYTHON, make_request("embeddings"), data)


def embeddings(*vectors: Any) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return orjson.dumps({"object": "list", "data": data, "model": "m"})


def test_embeddings_of_llama_cpp_python() -> None:
    flat = embeddings([0.5, -1.0], [])
    assert repair_whole(LLAMA_CPP_PYTHON, make_request("embeddings"), flat) == flat
    packed = repair_whole(LLAMA_CPP_PYTHON, make_request("embeddings", encoding_format="base64"), flat)
    assert struct.unpack("<2f", base64.b64decode(orjson.loads(packed)["data"][0]["embedding"])) == (0.5, -1.0)
    with pytest.raises(RequestRejectedError, match="each token"):
        repair_whole(LLAMA_CPP_PYTHON, make_request("embeddings"), embeddings([[0.5], [1.0]]))


def test_other_whole_answers_get_the_public_name_only() -> None:
    data = orjson.dumps(ANSWER)
    assert repair_whole(VLLM, make_request(), data) is data
    assert orjson.loads(repair_whole(VLLM, make_request(alias="public"), data))["model"] == "public"
