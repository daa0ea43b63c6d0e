from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.request.test_parsing import USER, read
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.prompt import estimate_tokens


def test_every_text_of_the_prompt_counts() -> None:
    parts = [{"type": "text", "text": "four five"}, {"type": "refusal", "refusal": "six"}]
    messages = [USER, {"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert read({"messages": messages}).prompt_words == 6


@pytest.mark.parametrize(
    ("prompt", "words", "needs"),
    [
        ("a b", 2, set()),
        (["a b"], 2, set()),
        (["a b", "c"], 3, {"prompt_list"}),
        ([1, 2, 3, 4], 3, {"token_ids"}),
        ([[1, 2], [3, 4]], 3, {"token_ids", "prompt_list"}),
        ([" a\n b ", "", "c"], 3, {"prompt_list"}),
    ],
)
def test_prompts(prompt: Any, words: int, needs: set[str]) -> None:
    features = read({"prompt": prompt}, endpoint="completions")
    assert features.prompt_words == words
    assert features.needs == {"generation", *needs}


def test_words_of_a_huge_prompt_are_extrapolated() -> None:
    assert read({"prompt": "word " * 20_000}, endpoint="completions").prompt_words == 20_000
    assert read({"prompt": "word " * 200_000}, endpoint="completions").prompt_words == 200_000
    assert read({"prompt": ["word " * 100_000] * 3}, endpoint="completions").prompt_words == 300_000


def test_a_conversation_begins_alike_in_every_turn() -> None:
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Six."}
    first = read({"messages": [system, USER]}).prefix
    assert first == "Be brief.\none two three"
    assert read({"messages": [system, USER, answer, {"role": "user", "content": "And?"}]}).prefix == first
    assert read({"messages": [USER, answer]}).prefix == "one two three"
    assert len(read({"prompt": "word " * 5000}, endpoint="completions").prefix) == 512
    assert read({"prompt": [1, 2, 3]}, endpoint="completions").prefix == ""


@pytest.mark.parametrize("prompt", [None, [], 5, [{"a": 1}], [-1], ["a", None], [True], ["a", 5], [[1], 5], [[]]])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(BadRequestError) as caught:
        read({"prompt": prompt}, endpoint="completions")
    assert caught.value.param == "prompt"


def test_too_many_messages() -> None:
    with pytest.raises(BadRequestError, match="3 messages; the limit is 2"):
        read({"messages": [USER] * 3}, messages=2)


def test_estimates_grow_with_the_text() -> None:
    assert estimate_tokens("") == 1
    assert estimate_tokens("a" * 420) == 101
    assert estimate_tokens("한" * 100) > estimate_tokens("a" * 100)


def test_tools_and_their_calls_are_part_of_the_prompt() -> None:
    described = {"type": "function", "function": {"name": "f", "description": "word " * 2000}}
    for fields in (
        {"tools": [described]},
        {"functions": [described["function"]]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "word " * 2000}}]}]},
        {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "word " * 2000}}]},
    ):  # fmt: skip
        features = read(fields)
        assert 2000 < features.prompt_words < 2100
        assert features.prompt_tokens > 2000
        assert features.prefix == "one two three"


def test_a_prompt_without_white_space_is_as_long_as_its_tokens() -> None:
    """130 tokens count as 100 words."""
    for text in ("\u4e2d\u6587" * 500, json.dumps([{"id": n} for n in range(500)], separators=(",", ":"))):
        features = read({"messages": [{"role": "user", "content": text}]})
        assert len(text.split()) == 1
        assert features.prompt_words == features.prompt_tokens * 100 // 130 > 900
    assert read({"messages": [{"role": "user", "content": "word " * 99}]}).prompt_words == 99


def test_each_of_several_prompts_meets_the_context_by_itself() -> None:
    one = read({"input": "word " * 200}, endpoint="embeddings")
    batch = read({"input": ["word " * 200] * 100}, endpoint="embeddings")
    assert batch.prompt_tokens == one.prompt_tokens
    assert batch.prompt_words > 15_000
    assert read({"input": [[1] * 50, [1] * 60]}, endpoint="embeddings").prompt_tokens == 60
    assert read({"prompt": ["a" * 42, "a"]}, endpoint="completions").prompt_tokens == 11


def test_the_number_of_prompts_is_limited() -> None:
    read({"input": ["a"] * 2048}, endpoint="embeddings")
    with pytest.raises(BadRequestError, match="input has 2049 texts; the limit is 2048"):
        read({"input": ["a"] * 2049}, endpoint="embeddings")
    read({"prompt": ["a"] * 32, "n": 4}, endpoint="completions")
    for fields in ({"prompt": ["a"] * 129}, {"prompt": [[1]] * 33, "n": 4}, {"prompt": ["a", "b"], "best_of": 65}):
        with pytest.raises(BadRequestError, match="the limit is 128"):
            read(fields, endpoint="completions")


def test_content_parts_count_as_messages() -> None:
    part = {"type": "text", "text": "a"}
    with pytest.raises(BadRequestError, match="more than 3 content parts"):
        read({"messages": [{"role": "user", "content": [part] * 2}] * 2}, messages=3)
