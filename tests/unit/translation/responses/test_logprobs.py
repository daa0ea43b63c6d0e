"""The probabilities of the text's tokens, among those of the whole answer."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from xgen_proxy.translation.chat import Answer, Finish, ToolCall, Usage
from xgen_proxy.translation.responses.logprobs import logprobs_of_text, output_logprobs
from xgen_proxy.translation.responses.response import ResponseHead, whole_response
from xgen_proxy.translation.responses.tools import read_tools

CALL = ToolCall("a", "f", "{}")
THOUGHT = ("<think>", "Hm", "</think>")


def logprob(token: str, spelt: list[int] | None = None) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "bytes": spelt, "top_logprobs": []}


def answer(text: str, *tokens: str, reasoning: str = "Hm", calls: tuple[ToolCall, ...] = ()) -> Answer:
    return Answer(text, reasoning, calls, Finish("stop"), Usage(), tuple(map(logprob, tokens)))


def kept(found: Answer) -> list[str]:
    return [each["token"] for each in logprobs_of_text(found)]


@pytest.mark.parametrize(
    ("found", "tokens"),
    [
        (answer("Hello you", *THOUGHT, "Hello", " you"), ["Hello", " you"]),
        (answer("Hello", *THOUGHT, "\n\n", "Hello", "<|im_end|>"), ["Hello"]),
        (answer("\n\nHello", *THOUGHT, "\n\n", "Hello"), ["\n\n", "Hello"]),
        (answer("Hello", *THOUGHT, " Hello", "\n"), [" Hello"]),  # vLLM stripped the text
        (answer(" Hello ", *THOUGHT, "Hello"), ["Hello"]),
        (answer("Hm", *THOUGHT, "Hm"), ["Hm"]),
        (answer("s", *THOUGHT, "s", "</s>"), ["s"]),
        (answer("So", *THOUGHT, "", "So", ""), ["So"]),
        (answer("I look", *THOUGHT, "I", " look", "<tool_call>", "{", calls=(CALL,)), ["I", " look"]),
        (answer("Hello", *THOUGHT, "Hel", "lo, you"), []),
        (answer("Hello", *THOUGHT), []),
        (answer("", *THOUGHT), []),
        (answer("Hello"), []),
    ],
)
def test_only_the_tokens_of_the_text_are_kept(found: Answer, tokens: list[str]) -> None:
    assert kept(found) == tokens


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("Hello", ("Hel", "lo"), ["Hel", "lo"]),
        ("Hello", ("Hel", "lo", "<|im_end|>"), ["Hel", "lo"]),
        ("Hello", ("token_id:5", "token_id:6"), ["token_id:5", "token_id:6"]),  # vLLM, if asked for ids
        ("", ("<|im_end|>",), ["<|im_end|>"]),
    ],
)
def test_a_mere_text_keeps_all_if_its_tokens_do_not_spell_it(
    text: str, tokens: tuple[str, ...], expected: list[str]
) -> None:
    assert kept(answer(text, *tokens, reasoning="")) == expected


def test_a_character_may_be_spread_over_tokens() -> None:
    halves = [logprob("\ufffd", list("é".encode()[:1])), logprob("\ufffd", list("é".encode()[1:]))]
    found = Answer("é", "Hm", (), Finish("stop"), Usage(), (logprob("Hm"), *halves))
    assert list(logprobs_of_text(found)) == halves


@pytest.mark.parametrize("spelt", [[256], ["a"], "a", 10**12])
def test_bytes_that_are_none_are_not_read(spelt: Any) -> None:
    found = Answer("a", "Hm", (), Finish("stop"), Usage(), (logprob("Hm"), logprob("a", spelt)))
    assert kept(found) == ["a"]


def test_a_whole_response_has_none_of_its_thoughts() -> None:
    sent = {"input": "Hi"}
    found = answer("Hello", *THOUGHT, "\n\n", "Hel", "lo", "<|im_end|>")
    response = orjson.loads(whole_response(ResponseHead(sent, "m"), read_tools(sent), found))
    [part] = response["output"][1]["content"]
    assert "".join(each["token"] for each in part["logprobs"]) == part["text"] == "Hello"


def test_the_engines_own_fields_are_left_out() -> None:
    given = {**logprob("é"), "id": 5, "top_logprobs": [{**logprob("e"), "id": 6}]}
    top = {"token": "e", "bytes": [101], "logprob": -0.5}
    assert output_logprobs([given]) == [{"token": "é", "bytes": [195, 169], "logprob": -0.5, "top_logprobs": [top]}]
