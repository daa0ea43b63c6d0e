from __future__ import annotations

import base64
import struct
from typing import Any

import orjson
import pytest

from tests.support.chunks import HI, LLAMA_CPP_PYTHON, Replica, make_request
from tests.support.requests import make_opaque_request
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.llama_cpp_python.dialect import UNLIMITED
from xgen_proxy.errors import MissingCapabilityError, RequestRejectedError, UpstreamProtocolError
from xgen_proxy.request.features import Json


async def test_an_empty_stream_is_explained() -> None:
    asked: list[tuple[str, Json]] = []

    async def too_long(path: str, body: Json) -> tuple[int, Any]:
        asked.append((path, body))
        message = "This model's maximum context length is 2048 tokens. However, you requested 18035 tokens."
        return 400, {"error": {"message": message, "code": "context_length_exceeded"}}

    error = await LLAMA_CPP_PYTHON.explain_empty_stream(make_request(stream=True), too_long)
    assert isinstance(error, RequestRejectedError)
    assert error.code == "context_length_exceeded"
    [(path, body)] = asked
    assert (path, body["stream"], body["max_tokens"]) == ("/v1/chat/completions", False, 1)


def test_info_has_models_only() -> None:
    info = LLAMA_CPP_PYTHON.parse_info({"/v1/models": {"data": [{"id": "a"}]}})
    assert (info.models, info.context, info.slots, info.capabilities) == (("a",), None, None, None)


def embeddings(*vectors: Any) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return orjson.dumps({"object": "list", "data": data, "model": "m"})


def test_embeddings_are_one_vector_each_and_may_be_base64() -> None:
    flat = embeddings([0.5, -1.0], [])
    assert LLAMA_CPP_PYTHON.repair_whole(make_request("embeddings"), flat) == flat
    packed = LLAMA_CPP_PYTHON.repair_whole(make_request("embeddings", encoding_format="base64"), flat)
    assert struct.unpack("<2f", base64.b64decode(orjson.loads(packed)["data"][0]["embedding"])) == (0.5, -1.0)
    with pytest.raises(RequestRejectedError, match="each token"):
        LLAMA_CPP_PYTHON.repair_whole(make_request("embeddings"), embeddings([[0.5], [1.0]]))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}"])
def test_malformed_embeddings_raise(data: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        LLAMA_CPP_PYTHON.repair_whole(make_request("embeddings"), data)


TEMPLATE = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")


def test_a_chat_is_resumed_as_a_completion() -> None:
    request = make_request(max_tokens=5, chat_template_kwargs={}, messages=[{"role": "developer", "content": "Hi"}])
    resumed = LLAMA_CPP_PYTHON.resume_chat(request, "Once", TEMPLATE)
    assert resumed.path == "/v1/completions"
    assert resumed.body == {"model": "m", "prompt": "<system>Hi<assistant>Once", "max_tokens": 5}
    assert resumed.features.max_tokens == 5


def test_a_resumed_chat_without_a_limit_may_fill_the_context() -> None:
    assert LLAMA_CPP_PYTHON.resume_chat(make_request(context=99), "Once", TEMPLATE).body["max_tokens"] == 99
    assert LLAMA_CPP_PYTHON.resume_chat(make_request(), "Once", TEMPLATE).body["max_tokens"] == UNLIMITED


def test_a_chat_is_resumed_only_with_a_template() -> None:
    assert LLAMA_CPP_PYTHON.can_resume(make_request().features, TEMPLATE)
    assert not LLAMA_CPP_PYTHON.can_resume(make_request().features, None)
    assert LLAMA_CPP_PYTHON.can_resume(make_request("completions").features, None)
    with pytest.raises(UpstreamProtocolError, match="chat_template"):
        LLAMA_CPP_PYTHON.resume_chat(make_request(), "Once", None)


async def test_tokens_are_counted_without_what_precedes_any_text() -> None:
    assert await LLAMA_CPP_PYTHON.count_tokens(make_request(), "abc", Replica(before=1).post) == 3


def test_it_tokenizes_under_other_names() -> None:
    request = make_opaque_request("tokenize", prompt="a", add_special_tokens=True)
    assert LLAMA_CPP_PYTHON.path(request) == "/extras/tokenize"
    assert LLAMA_CPP_PYTHON.prepared(request) == {"model": "m", "input": "a"}
    assert orjson.loads(LLAMA_CPP_PYTHON.repair_whole(request, b'{"tokens":[1,2]}')) == {
        "count": 2,
        "max_model_len": 2048,
        "tokens": [1, 2],
    }
    back = make_opaque_request("detokenize", tokens=[1])
    assert LLAMA_CPP_PYTHON.path(back) == "/extras/detokenize"
    assert LLAMA_CPP_PYTHON.prepare(back) is back.raw
    assert orjson.loads(LLAMA_CPP_PYTHON.repair_whole(back, b'{"text":"a"}')) == {"prompt": "a"}
    with pytest.raises(UpstreamProtocolError):
        LLAMA_CPP_PYTHON.repair_whole(back, b"{}")


@pytest.mark.parametrize("fields", [{"messages": HI}, {"prompt": "a", "add_special_tokens": False}, {"prompt": [1]}])
def test_what_it_cannot_tokenize_is_for_another_engine(fields: Json) -> None:
    with pytest.raises(MissingCapabilityError, match="adds special tokens"):
        LLAMA_CPP_PYTHON.prepared(make_opaque_request("tokenize", **fields))
