from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from tests.support.chunks import HI, LLAMA_SERVER, Replica, delta, events, make_request, read, text
from tests.support.requests import make_opaque_request
from xgen_proxy.errors import MissingCapabilityError, UpstreamProtocolError
from xgen_proxy.request.features import Endpoint, Json

QUIET: dict[str, Any] = {}
ASKED: dict[str, Any] = {"stream_options": {"include_usage": True}}


async def test_a_stream_has_one_created_and_a_role() -> None:
    editor = LLAMA_SERVER.stream_editor(make_request(stream=True, alias="public"))
    assert editor is not None
    first = {**delta(content="😀"), "created": 7}
    out = read(editor.edit(events(first))) + read(editor.edit(events({**delta("stop"), "created": 8})))
    assert [chunk["created"] for chunk in out] == [7, 7, 7]
    assert {chunk["model"] for chunk in out} == {"public"}
    assert out[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert out[0]["choices"][0]["finish_reason"] is None
    assert out[1]["choices"][0]["delta"] == {"content": "😀"}
    assert await editor.finish(Replica().post) == b""


def test_a_stream_with_a_role_passes_unchanged() -> None:
    editor = LLAMA_SERVER.stream_editor(make_request(stream=True))
    assert editor is not None
    block = events(delta(role="assistant", content=None), delta(content="a"))
    assert editor.edit(block) == block
    assert not editor.done


async def test_usage_of_several_choices_is_one_sum() -> None:
    request = make_request(stream=True, n=2, stream_options={"include_usage": True})
    editor = LLAMA_SERVER.stream_editor(request)
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


async def test_a_completion_has_usage_only_if_asked() -> None:
    usage = {"completion_tokens": 3, "prompt_tokens": 4, "total_tokens": 7}
    for options, expected in (QUIET, []), (ASKED, [usage]):
        editor = LLAMA_SERVER.stream_editor(make_request("completions", stream=True, **options))
        assert editor is not None
        out = read(editor.edit(events(text("a"), {**text("", "length"), "usage": usage})))
        assert [chunk["choices"][0]["text"] for chunk in out] == ["a", ""]
        assert not any("usage" in chunk for chunk in out)
        tail = read(await editor.finish(Replica().post))
        assert [chunk["usage"] for chunk in tail] == expected
        assert [chunk["choices"] for chunk in tail] == [[] for _ in expected]


def test_logprobs_of_a_completion_get_its_own_shape() -> None:
    def chat_shape(token: str) -> Json:
        return {"content": [{"token": token, "logprob": -1.0, "top_logprobs": [{"token": token, "logprob": -1.0}]}]}

    request = make_request("completions", stream=True, logprobs=1, prompt=["a", "b"])
    editor = LLAMA_SERVER.stream_editor(request)
    assert editor is not None
    pieces = [text("ab", logprobs=chat_shape("ab")), text("x", index=1, logprobs=chat_shape("x")),
              text("c", logprobs=chat_shape("c")), text("", "stop")]  # fmt: skip
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in read(editor.edit(events(*pieces)))]
    assert logprobs[0] == {
        "tokens": ["ab"], "token_logprobs": [-1.0], "top_logprobs": [{"ab": -1.0}], "text_offset": [0],
    }  # fmt: skip
    assert [each["text_offset"] for each in logprobs[:3]] == [[0], [0], [2]]
    assert logprobs[3] is None


def test_reasoning_is_resumed_by_its_own_field() -> None:
    for after in (None, "Yes"):
        [resumed] = LLAMA_SERVER.resume_reasoning(make_request(), "So", after)
        message = {"role": "assistant", "content": after or "", "reasoning_content": "So"}
        assert resumed.body["messages"][-1] == message
        assert (resumed.body["continue_final_message"], resumed.body["add_generation_prompt"]) == (True, False)
    assert LLAMA_SERVER.resume_reasoning(make_request(), "", "Yes") == ()


def test_info_has_what_props_reports() -> None:
    models = {"data": [{"id": "a", "meta": {"n_ctx": 4096}}]}
    props = {"total_slots": 8, "chat_template_caps": {"supports_tools": True}, "modalities": {"vision": True}}
    info = LLAMA_SERVER.parse_info({"/v1/models": models, "/props": props})
    assert (info.models, info.context, info.slots) == (("a",), 4096, 8)
    assert info.capabilities == LLAMA_SERVER.capabilities | {"tools", "forced_tool", "images"}
    heard = {"modalities": {"vision": False, "audio": True, "video": False}}
    info = LLAMA_SERVER.parse_info({"/v1/models": models, "/props": heard})
    assert info.capabilities == LLAMA_SERVER.capabilities | {"audio", "transcriptions"}
    plain = LLAMA_SERVER.parse_info({"/v1/models": models, "/props": {"total_slots": 4}})
    assert plain.capabilities == LLAMA_SERVER.capabilities
    assert LLAMA_SERVER.parse_info({"/v1/models": models, "/props": None}).slots is None


# parts of messages


def test_parts_that_it_does_not_know_become_parts_that_it_knows() -> None:
    text = {"type": "text", "text": "Hi"}
    wav = "UklGRiQAAABXQVZF"  # RIFF…WAVE
    turns = [
        {"role": "user", "content": [text, {"type": "audio_url", "audio_url": {"url": "data:audio/mpeg;base64,SUQz"}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "tool_calls": []},
        {
            "role": "user",
            "content": [{"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{wav}"}}],
        },
        {"role": "user", "content": "Go on."},
    ]
    prepared = LLAMA_SERVER.prepared(make_request(messages=turns))["messages"]
    assert [each.get("content") for each in prepared] == [
        [text, {"type": "input_audio", "input_audio": {"data": "SUQz", "format": "mp3"}}],
        [{"type": "text", "text": "No."}],
        None,
        [{"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}],
        "Go on.",
    ]


def test_remote_audio_is_for_another_engine() -> None:
    part = {"type": "audio_url", "audio_url": {"url": "https://media.example/a.wav"}}
    request = replace(make_request(), body={"model": "m", "messages": [{"role": "user", "content": [part]}]})
    with pytest.raises(MissingCapabilityError, match="audio as data only"):
        LLAMA_SERVER.prepared(request)


# tokens, reranking and audio


@pytest.mark.parametrize(
    ("sent", "prepared"),
    [
        ({"prompt": "a"}, {"content": "a", "add_special": True}),
        ({"prompt": "a", "add_special_tokens": False}, {"content": "a", "add_special": False}),
        ({"content": "a", "with_pieces": True}, {"content": "a", "with_pieces": True}),
    ],
)
def test_vllms_names_on_tokenize(sent: Json, prepared: Json) -> None:
    """llama-server answers a prompt with 200 and no tokens."""
    assert LLAMA_SERVER.prepared(make_opaque_request("tokenize", **sent)) == {"model": "m", **prepared}


def test_messages_are_for_another_engine_to_tokenize() -> None:
    with pytest.raises(MissingCapabilityError, match="a prompt, one text, only"):
        LLAMA_SERVER.prepared(make_opaque_request("tokenize", messages=HI))


def test_answers_of_tokenize_have_vllms_fields_too() -> None:
    def answer(endpoint: Endpoint, data: bytes) -> Json:
        body: Json = orjson.loads(LLAMA_SERVER.repair_whole(make_opaque_request(endpoint), data))
        return body

    assert answer("tokenize", b'{"tokens":[1,2]}') == {"tokens": [1, 2], "count": 2, "max_model_len": 2048}
    assert answer("detokenize", b'{"content":"a"}') == {"content": "a", "prompt": "a"}
    assert answer("rerank", b'{"results":[]}') == {"results": []}
    for malformed in (b"", b"[]", b"{}", b'{"tokens":5}'):
        with pytest.raises(UpstreamProtocolError):
            answer("tokenize", malformed)


@pytest.mark.parametrize(("status", "missing"), [(400, set()), (501, {"rerank"}), (404, {"rerank"})])
async def test_a_request_without_a_query_tells_whether_it_reranks(status: int, missing: set[str]) -> None:
    async def ask(path: str, body: Json | None) -> tuple[int, Any]:
        assert (path, body) == ("/v1/rerank", {})
        return status, {}

    assert await LLAMA_SERVER.missing_routes(ask) == missing


@pytest.mark.parametrize("hears", [True, False])
def test_a_model_that_hears_transcribes(hears: bool) -> None:
    info = LLAMA_SERVER.parse_info({"/v1/models": {"data": [{"id": "a"}]}, "/props": {"modalities": {"audio": hears}}})
    assert info.capabilities is not None
    assert ("transcriptions" in info.capabilities) == hears
