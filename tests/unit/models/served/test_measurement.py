"""Windows of a text, and the figures of all of them."""

from __future__ import annotations

import pytest

from tests.support.scripted_engines import engine, llama_server
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.served.engines import VLLM, LlamaCppPython, LlamaServer
from xgen_proxy.models.served.measurement import DifferentTokensError, described, measure, pieces

TEXT = " ".join(str(n) for n in range(1000, 1100))
SIZES = {"tokens": 60, "window": 20, "top": 20}


def test_engines_that_agree() -> None:
    result = measure(engine(VLLM), engine(LlamaServer), {"numbers": TEXT, "more": TEXT}, **SIZES)
    assert result.all.top1 == 1
    assert result.all.kld == 0
    assert set(result.texts) == {"numbers", "more"}
    assert result.all.positions == 2 * result.texts["more"].positions
    assert 50 < result.texts["more"].positions < 80


def test_llama_cpp_python_leaves_out_the_first_position_of_each_window() -> None:
    by_server = measure(engine(VLLM), engine(LlamaServer), {"numbers": TEXT}, **SIZES).all.positions
    by_binding = measure(engine(VLLM), engine(LlamaCppPython), {"numbers": TEXT}, **SIZES).all.positions
    assert 0 < by_server - by_binding < 10


def test_different_tokens_are_refused_with_the_place() -> None:
    other = engine(LlamaServer, lambda path, body: llama_server(path, {**body, "content": "1000 1001 7 8 9"}))
    with pytest.raises(DifferentTokensError, match=r"from number 3 on \[1002, 1003, 1004\] and \[7, 8, 9\]"):
        measure(engine(VLLM), other, {"numbers": TEXT}, **SIZES)


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(ModelError, match="the text short is too short"):
        measure(engine(VLLM), engine(LlamaServer), {"short": "1"}, **SIZES)


def test_pieces_lose_nothing_but_spaces() -> None:
    found = pieces(TEXT, 20, 100)
    assert " ".join(found) == TEXT
    assert len(found) >= 5
    assert "".join(pieces("가" * 100, 10, 100)) == "가" * 100


def test_a_side_of_a_result_file() -> None:
    assert described(engine(VLLM), "gpu") == {
        "backend": "gpu",
        "url": "http://vllm",
        "engine": "vllm",
        "served_as": "m",
        "version": "0.32.0",
        "root": "models/m",
    }
