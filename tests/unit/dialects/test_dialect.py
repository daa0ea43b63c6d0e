from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import ANSWER, LLAMA_CPP_PYTHON, LLAMA_SERVER, OPENAI, VLLM, make_request
from tests.support.forms import FORM, field, file, form
from xgen_proxy.dialects.backend_request import ModelFacts
from xgen_proxy.dialects.dialect import MAX_MODEL_NAME, MAX_MODELS, model_facts
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import NEEDS, Json
from xgen_proxy.request.opaque.multipart import read_form


@pytest.mark.parametrize("dialect", [VLLM, OPENAI], ids=lambda dialect: dialect.name)
def test_a_body_that_needs_no_change_is_sent_as_it_came(dialect: Any) -> None:
    request = make_request(unknown={"a": [1, 2]}, n=2, stop=["a"], temperature=None)
    assert dialect.prepare(request) is request.raw
    assert dialect.prepared(request) is request.body


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_the_model_gets_its_served_name(dialect: Any) -> None:
    request = make_request(alias="public", served="theirs")
    assert orjson.loads(dialect.prepare(request))["model"] == "theirs"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_a_form_has_known_fields_only(dialect: Any) -> None:
    """llama-server takes the text fields of a form for those of a chat."""
    known = [
        field("timestamp_granularities[]", b"word"), field("chunking_strategy[type]", b"server_vad"),
        field("hotwords", b"Seoul"), field("max_completion_tokens", b"9"), file(), field("prompt", b"Hi"),
    ]  # fmt: skip
    unknown = [
        field(name, b"1") for name in ("grammar", "json_schema", "tools", "messages", "n", "chat_parser", "vllm_xargs",
                                       "priority", "backend", "session_id", "Grammar", "chunking_strategy[grammar]")
    ]  # fmt: skip
    raw = form(field("model", b"m"), *unknown[:3], *known, *unknown[3:])
    sent = read_form(raw, {b"content-type": FORM.encode()})
    request = replace(make_request(), form=sent, served="m")
    assert dialect.prepare(request) == form(field("model", b"m"), *known)


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


CARD = {
    "vocab_type": 2, "n_vocab": 49_152, "n_ctx": 1024, "n_ctx_train": 8192, "n_embd": 576, "n_params": 134_515_008,
    "size": 96_576_768, "ftype": "Q4_1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (CARD, ModelFacts(49_152, 8192, None, 576, 134_515_008, 96_576_768, "Q4_1")),
        ({"n_params": 405 * 10**9}, ModelFacts(parameters=405 * 10**9)),
        ({}, ModelFacts()),
        ({"n_vocab": "9", "n_embd": -1, "n_params": 2**99, "size": 1.5, "ftype": "x" * 65}, ModelFacts()),
        (None, None),
        ([1], None),
    ],
)
def test_what_llama_server_says_of_its_model(meta: Any, expected: ModelFacts | None) -> None:
    assert model_facts(meta) == expected


def test_several_models_have_no_facts_in_common() -> None:
    cards = [{"id": "a", "meta": CARD}, {"id": "b", "meta": CARD}]
    assert LLAMA_SERVER.parse_info({"/v1/models": {"data": cards}, "/props": {}}).model is None
    one = LLAMA_SERVER.parse_info({"/v1/models": {"data": cards[:1]}, "/props": {"total_slots": 3}})
    assert one.model
    assert (one.model.vocabulary, one.context, one.slots) == (49_152, 1024, 3)
    assert LLAMA_SERVER.parse_info({"/v1/models": {"data": []}, "/props": None}).model is None


def test_a_whole_response_gets_the_public_model_name() -> None:
    data = orjson.dumps(ANSWER)
    assert VLLM.repair_whole(make_request(), data) is data
    assert orjson.loads(VLLM.repair_whole(make_request(alias="public"), data))["model"] == "public"


async def test_an_empty_stream_without_a_reason() -> None:
    async def fine(path: str, body: Json) -> tuple[int, Any]:
        return 200, {}

    for dialect in (LLAMA_CPP_PYTHON, LLAMA_SERVER, VLLM):
        assert isinstance(await dialect.explain_empty_stream(make_request(stream=True), fine), UpstreamProtocolError)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
cards = st.fixed_dictionaries(
    {"id": anything},
    optional={"max_model_len": anything, "meta": anything | st.fixed_dictionaries({"n_ctx": anything})},
)
props = st.fixed_dictionaries(
    {}, optional={"total_slots": anything, "modalities": anything, "chat_template_caps": anything}
)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
@given(
    models=anything | st.fixed_dictionaries({"data": st.lists(cards, max_size=3) | anything}), props=anything | props
)
def test_replica_info_is_in_bounds_or_malformed(dialect: Any, models: Any, props: Any) -> None:
    """A replica with no slots, or a negative context, would break each decision."""
    try:
        info = dialect.parse_info({"/v1/models": models, "/props": props})
    except (AttributeError, LookupError, TypeError, ValueError):
        return
    assert info.slots is None or 0 < info.slots < 2**31
    assert info.context is None or 0 < info.context < 2**31
    assert all(isinstance(name, str) and len(name) <= MAX_MODEL_NAME for name in info.models)


def test_models_of_a_replica_have_a_limit() -> None:
    listed = {"data": [{"id": str(number)} for number in range(2_000)]}
    assert len(OPENAI.parse_info({"/v1/models": listed}).models) == MAX_MODELS
