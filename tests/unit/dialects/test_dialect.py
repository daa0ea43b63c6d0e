from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.support.chunks import ANSWER, LLAMA_CPP_PYTHON, LLAMA_SERVER, OPENAI, VLLM, make_request
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import NEEDS, Json


@pytest.mark.parametrize("dialect", [VLLM, OPENAI], ids=lambda dialect: dialect.name)
def test_a_body_that_needs_no_change_is_sent_as_it_came(dialect: Any) -> None:
    request = make_request(unknown={"a": [1, 2]}, n=2, stop=["a"], temperature=None)
    assert dialect.prepare(request) is request.raw
    assert dialect.prepared(request) is request.body


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_the_model_gets_its_served_name(dialect: Any) -> None:
    request = make_request(alias="public", served="theirs")
    assert orjson.loads(dialect.prepare(request))["model"] == "theirs"


def test_embeddings_are_never_streamed() -> None:
    request = make_request("embeddings", encoding_format="base64", dimensions=None)
    assert orjson.loads(LLAMA_CPP_PYTHON.prepare(request)) == {"model": "m", "input": "Hi"}
    for dialect in DIALECTS.values():
        assert not dialect.asks_for_stream(request)


def test_which_engines_are_asked_for_a_stream() -> None:
    whole, stream = make_request(), make_request(stream=True)
    assert [dialect.asks_for_stream(whole) for dialect in (VLLM, LLAMA_SERVER, LLAMA_CPP_PYTHON, OPENAI)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert all(dialect.asks_for_stream(stream) for dialect in DIALECTS.values())
    assert not LLAMA_CPP_PYTHON.asks_for_stream(make_request(stream=True, logprobs=True))
    assert LLAMA_SERVER.asks_for_stream(make_request(stream=True, logprobs=True))


def test_capabilities() -> None:
    assert OPENAI.capabilities == NEEDS
    assert "grammar" not in VLLM.capabilities | LLAMA_CPP_PYTHON.capabilities
    assert "forced_tool" in LLAMA_CPP_PYTHON.capabilities
    assert "tools" not in LLAMA_CPP_PYTHON.capabilities | LLAMA_SERVER.capabilities
    assert (LLAMA_CPP_PYTHON.slots, LLAMA_CPP_PYTHON.overcommit) == (1, 0)
    assert not LLAMA_SERVER.reuse_after_stream


def test_a_whole_response_gets_the_public_model_name() -> None:
    data = orjson.dumps(ANSWER)
    assert VLLM.repair_whole(make_request(), data) is data
    assert orjson.loads(VLLM.repair_whole(make_request(alias="public"), data))["model"] == "public"


async def test_an_empty_stream_without_a_reason() -> None:
    async def fine(path: str, body: Json) -> tuple[int, Any]:
        return 200, {}

    for dialect in (LLAMA_CPP_PYTHON, LLAMA_SERVER, VLLM):
        assert isinstance(await dialect.explain_empty_stream(make_request(stream=True), fine), UpstreamProtocolError)
