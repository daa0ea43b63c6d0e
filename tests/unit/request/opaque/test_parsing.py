from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.support.forms import FORM, field, file, form
from tests.support.requests import make_opaque_call as parse
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.call import Origin
from xgen_proxy.request.fields import MAX_INPUTS
from xgen_proxy.request.opaque.multipart import read_form
from xgen_proxy.request.opaque.parsing import parse_opaque, sequences_of


def test_a_request_needs_its_endpoint_and_passes_as_it_came() -> None:
    call = parse("rerank", query="a b", documents=["c d e", {"text": "f"}], temperature="anything")
    assert call.features.needs == {"rerank"}
    assert (call.model, call.features.prompt_words, call.features.prompt_tokens) == ("m", 7, 0)
    assert call.raw == orjson.dumps(call.body)
    assert parse("detokenize", tokens=[1]).features.needs == {"tokenize"}


def test_long_texts_are_long_prompts_but_not_for_a_tokenizer() -> None:
    words = "word " * 200
    assert parse("classify", input=words).features.prompt_words == 200
    assert parse("score", text_1="a", text_2=[words, words]).features.prompt_words == 401
    assert parse("classify", messages=[{"role": "user", "content": words}]).features.prompt_words > 200
    assert parse("tokenize", prompt=words).features.prompt_words == 0


def test_hints() -> None:
    call = parse("rerank", {b"x-urgency": b"low", b"x-fallback": b"none"}, backend="gpu", session_id="s", urgency=5)
    assert (call.features.backend, call.features.session, call.features.urgency) == ("gpu", "s", "low")
    assert not call.features.fallback
    assert not call.features.hinted, "presets are for text"
    assert call.raw is None
    assert call.body == {"model": "m", "urgency": 5}
    with pytest.raises(BadRequestError, match="urgency"):
        parse("rerank", {b"x-urgency": b"now"})


@pytest.mark.parametrize("model", [None, ""])
def test_the_default_model_is_asked_for_where_none_is_named(model: str | None) -> None:
    assert parse("tokenize", model=model, prompt="a").model == "m"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": "m" * 513}, "model"),
        ({"documents": ["a"] * (MAX_INPUTS + 1)}, "documents"),
        ({"backend": 5}, "backend"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse("rerank", **fields)
    assert caught.value.param == param


def test_a_form_passes_whole() -> None:
    raw = form(file(), field("model", b"whisper"), field("stream", b"true"))
    found = read_form(raw, {b"content-type": FORM.encode()})
    call = parse_opaque(Origin("id", {}), "transcriptions", raw, dict(found.fields), lambda: "m", form=found)
    assert (call.model, call.features.stream, call.raw) == ("whisper", True, raw)
    assert call.form is found


def test_a_chat_is_one_sequence_of_any_number_of_messages() -> None:
    chat = [{"role": "user", "content": "a b"}] * (MAX_INPUTS + 1)
    assert parse("classify", messages=chat).features.prompt_words > 2 * MAX_INPUTS
    assert sequences_of("classify", {"messages": chat}) == 1
    assert sequences_of("classify", {"messages": chat, "input": ["a", "b"]}) == 2


def test_each_text_is_a_sequence() -> None:
    assert sequences_of("rerank", {"query": "a", "documents": ["b"] * 7}) == 7
    assert sequences_of("score", {"text_1": ["a"] * 2, "text_2": ["b"] * 3}) == 3
    assert sequences_of("classify", {"input": "a"}) == 1
    assert sequences_of("tokenize", {"prompt": ["a"] * 9}) == 1
    assert sequences_of("transcriptions", {"model": "m"}) == 1
