"""The logits of a window are llama.cpp's own, and answers are in the model's chat template."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from xgen_proxy.models.compare.evaluation import Model, resident_bytes

TEXT = "It was a bright cold day in the harbour, and the clocks of the island were striking noon. " * 2


@pytest.fixture(scope="module")
def model(gguf: str) -> Model:
    return Model(gguf, context=256, threads=1, mmap=False)


@pytest.fixture(scope="module")
def plain(gguf: str) -> llama_cpp.Llama:
    """llama-cpp-python's own way: all logits of a text."""
    return llama_cpp.Llama(gguf, n_ctx=64, n_batch=64, n_threads=1, n_gpu_layers=0, logits_all=True, verbose=False)


def test_the_second_half_of_a_window_is_scored(model: Model, plain: llama_cpp.Llama) -> None:
    tokens = model.tokenize(TEXT)[:32]
    plain.reset()
    plain.eval(tokens)
    expected = np.array(plain.scores[16:31])
    found = model.window(tokens)
    assert found.shape == (15, model.vocabulary_size)
    assert np.abs(found - expected).max() < 0.2  # another batch size rounds differently
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9


def test_windows_do_not_remember_each_other(model: Model) -> None:
    tokens = model.tokenize(TEXT)
    first = model.window(tokens[:16]).copy()
    model.window(tokens[8:24])
    assert np.array_equal(model.window(tokens[:16]), first)


def test_answers_are_those_of_llama_cpp_python(model: Model, plain: llama_cpp.Llama) -> None:
    message = {"role": "user", "content": "What is the capital of France?"}
    expected = plain.create_chat_completion([message], max_tokens=12, temperature=0)["choices"][0]["message"]["content"]
    found = plain.detokenize(model.answer(message["content"], 12)).decode()
    assert found == expected
    assert "<|im_" not in found


def test_an_answer_ends_where_the_model_ends_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([5, 6, 2, 7])  # 2 is <|im_end|>
    monkeypatch.setattr(model, "_best", lambda: next(said))
    assert model.answer("Hi", 10) == [5, 6]


def test_weights_that_are_damaged_are_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.full((7, model.vocabulary_size), np.nan, dtype=np.float32)
    monkeypatch.setattr(model, "_logits", lambda rows: broken)
    with pytest.raises(ValueError, match="weights are damaged"):
        model.window(list(range(16)))


def test_the_vocabulary_says_how_texts_begin(model: Model) -> None:
    found = model.vocabulary()
    assert len(found) == model.vocabulary_size + 1
    assert found[-1] == b"False"
    assert resident_bytes() > 1e7
