from __future__ import annotations

from typing import Any

import pytest

from tests.support.chunks import HI, VLLM, make_request
from tests.support.requests import make_opaque_request
from xgen_proxy.request.features import Json

AUDIO = "transcriptions", "translations"


def test_info_has_models_and_context() -> None:
    info = VLLM.parse_info({"/v1/models": {"data": [{"id": "a", "max_model_len": 2048}, {"id": "lora"}]}})
    assert (info.models, info.context, info.slots, info.capabilities) == (("a", "lora"), 2048, None, None)


@pytest.mark.parametrize("answer", [{}, {"/v1/models": None}, {"/v1/models": {}}, {"/v1/models": {"data": [5]}}])
def test_malformed_info_raises(answer: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        VLLM.parse_info(answer)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_beyond_the_context_becomes_what_the_prompt_leaves(field: str) -> None:
    """vLLM 0.32 refuses a max_tokens beyond its context, 0.26 a prompt and max_tokens beyond it."""

    def sent(limit: int, words: int = 1, context: int | None = 8192) -> int:
        messages = [{"role": "user", "content": "word " * words}]
        fields: dict[str, Any] = {field: limit}
        body = VLLM.prepared(make_request(messages=messages, context=context, **fields))
        value: int = body[field]
        return value

    assert 8000 < sent(32_000) < 8192
    assert 3000 < sent(32_000, words=2500) < 8192 - 2500
    assert sent(32_000, words=8000) == 8192, "by the estimate nothing is left, which may be wrong"
    assert sent(8192) == 8192
    assert sent(32_000, context=None) == 32_000


def test_a_chat_is_resumed_as_the_assistants_message() -> None:
    resumed = VLLM.resume_chat(make_request(), "Once", None)
    assert resumed.body["messages"] == [*HI, {"role": "assistant", "content": "Once"}]
    assert (resumed.body["continue_final_message"], resumed.body["add_generation_prompt"]) == (True, False)
    assert VLLM.can_resume(resumed.features, None)


@pytest.mark.parametrize(
    ("status", "answer", "count"),
    [(200, {"tokens": [1, 2]}, 2), (404, {}, None), (200, [], None), (200, {"tokens": None}, None)],
)
async def test_tokens_are_counted_if_the_replica_can(status: int, answer: Any, count: int | None) -> None:
    async def post(path: str, body: Json) -> tuple[int, Any]:
        assert (path, body["prompt"], body["add_special_tokens"]) == ("/tokenize", "abc", False)
        return status, answer

    assert await VLLM.count_tokens(make_request(), "abc", post) == count


@pytest.mark.parametrize(
    ("routes", "missing"),
    [
        ({"/v1/chat/completions", "/tokenize", "/detokenize"}, {"rerank", "score", "classify", *AUDIO}),
        ({"/v1/score", "/v1/rerank", "/tokenize", "/detokenize"}, {"generation", "classify", *AUDIO}),
        ({"/v1/completions", "/v1/audio/transcriptions", "/tokenize"},
         {"rerank", "score", "classify", "tokenize", "translations"}),
    ],
)  # fmt: skip
async def test_its_routes_tell_what_its_model_can(routes: set[str], missing: set[str]) -> None:
    async def ask(path: str, body: Json | None) -> tuple[int, Any]:
        assert body is None, "a GET"
        return 405 if path in routes else 404, {}

    assert await VLLM.missing_routes(ask) == missing


@pytest.mark.parametrize(
    ("sent", "prepared"),
    [
        ({"content": "a"}, {"prompt": "a", "add_special_tokens": False}),
        ({"content": "a", "add_special": True}, {"prompt": "a", "add_special_tokens": True}),
        ({"prompt": "a", "content": "b"}, {"prompt": "a", "content": "b"}),
        ({"messages": HI}, {"messages": HI}),
    ],
)
def test_llama_servers_names_on_tokenize(sent: Json, prepared: Json) -> None:
    assert VLLM.prepared(make_opaque_request("tokenize", **sent)) == {"model": "m", **prepared}
    rerank = make_opaque_request("rerank", **sent)
    assert VLLM.prepare(rerank) is rerank.raw
