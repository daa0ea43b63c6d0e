from __future__ import annotations

from typing import Any

import pytest

from tests.support.chunks import HI, VLLM, make_request
from xgen_proxy.request.features import Json


def test_info_has_models_and_context() -> None:
    info = VLLM.parse_info({"/v1/models": {"data": [{"id": "a", "max_model_len": 2048}, {"id": "lora"}]}})
    assert (info.models, info.context, info.slots, info.capabilities) == (("a", "lora"), 2048, None, None)


@pytest.mark.parametrize("answer", [{}, {"/v1/models": None}, {"/v1/models": {}}, {"/v1/models": {"data": [5]}}])
def test_malformed_info_raises(answer: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        VLLM.parse_info(answer)


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
