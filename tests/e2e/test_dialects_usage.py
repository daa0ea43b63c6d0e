"""Usage, text and finish_reason of llama-cpp-python, put together from a stream, are those of its own whole answer."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.e2e.through import Through, text_of, user
from tests.support.real_servers import CONTEXT, Server
from xgen_proxy import sse

GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 16}

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER["required"] = ["city", "days"]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
FORCED = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}

CHATS: dict[str, dict[str, Any]] = {
    "english": {"messages": user("What is the capital of France?")},
    "english, to its end": {"messages": user("Say hi."), "max_tokens": 60},
    "cut after one": {"messages": user("Tell me a story."), "max_tokens": 1},
    "cut after two": {"messages": user("Tell me a story."), "max_tokens": 2},
    "list": {"messages": user("List five fruits, one a line.")},
    "code": {"messages": user("Write a Python function that adds two numbers."), "max_tokens": 60},
    "code with tabs": {"messages": user("Repeat: \tif x:\n\t\treturn\n")},
    "html": {"messages": user("Write a small HTML page.")},
    "sums": {"messages": user("What is 7 times 8? And 123 * 456?")},
    "korean": {"messages": user("안녕하세요! 자기소개를 한국어로 해 주세요.")},
    "korean, long": {"messages": user("한국의 수도는 어디입니까?"), "max_tokens": 60},
    "japanese": {"messages": user("日本の首都はどこですか。日本語で。")},
    "chinese": {"messages": user("用中文介绍一下北京。")},
    "russian": {"messages": user("Расскажи короткую сказку по-русски.")},
    "french": {"messages": user("Écris une phrase en français avec des accents: é è ê ç.")},
    "arabic": {"messages": user("ما هي عاصمة مصر؟")},
    "emoji": {"messages": user("Answer with emoji only: 😀🎉🚀")},
    "emoji, cut within": {"messages": user("Repeat exactly: 😀😀😀😀"), "max_tokens": 3},
    "emoji and text": {"messages": user("Repeat exactly: I ❤️ 🐍 and 日本!")},
    "system": {"messages": [{"role": "system", "content": "You are a pirate."}, *user("Who are you?")]},
    "conversation": {
        "messages": [*user("Hi"), {"role": "assistant", "content": "Hello! How can I help?"}, *user("Name a colour.")]
    },
    "tool result": {
        "messages": [
            *user("Weather?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        ]
    },
    "parts": {"messages": user([{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}])},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, *user("What is water?")]},
    "stop, a word": {"messages": user("What is the capital of France?"), "stop": "Paris"},
    "stop, part of a word": {"messages": user("What is the capital of France?"), "stop": ["pital"]},
    "stop, several tokens": {"messages": user("What is the capital of France?"), "stop": [" of France is"]},
    "stop, at once": {"messages": user("What is the capital of France?"), "stop": ["The"]},
    "stop, a newline": {"messages": user("List five fruits, one a line."), "stop": ["\n"]},
    "stop, nearly": {"messages": user("What is the capital of France?"), "stop": ["capital of Spain", "is Rome"]},
    "stop, two at once": {"messages": user("What is the capital of France?"), "stop": ["France", "of France"]},
    "stop, korean": {"messages": user("한국의 수도는 어디입니까?"), "stop": ["의", "는"], "max_tokens": 60},
    "stop, cut while it may begin": {
        "messages": user("What is the capital of France?"), "stop": ["capital of Spain"], "max_tokens": 3,
    },
    "json_object": {"messages": user("A person as JSON"), "response_format": {"type": "json_object"}},
    "json_schema": {"messages": user("A person as JSON"), "response_format": SCHEMA, "max_tokens": 40},
    "forced tool": {"messages": user("Weather in Paris for 3 days?"), **FORCED},
    "forced tool, to its end": {"messages": user("Weather in Paris for 3 days?"), **FORCED, "max_tokens": 120},
    "forced tool, cut": {"messages": user("Weather in Paris?"), **FORCED, "max_tokens": 2},
    "sampled": {"messages": user("Tell me a story."), "temperature": 0.8, "seed": 7},
    "sampled, korean": {"messages": user("이야기를 해 주세요."), "temperature": 0.8, "seed": 7},
    "penalties": {"messages": user("Repeat: a a a a"), "frequency_penalty": 1.0, "presence_penalty": 0.5},
    "logit_bias": {"messages": user("Say hi."), "logit_bias": {"28": -100}},
    "logprobs": {"messages": user("Say hi 😀."), "logprobs": True, "top_logprobs": 2, "max_tokens": 6},
}  # fmt: skip

COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "One, two, three,"},
    "default length": {"prompt": "Once upon a time", "max_tokens": None},
    "korean": {"prompt": "옛날 옛적에"},
    "emoji": {"prompt": "😀😀😀"},
    "code": {"prompt": "def add(a, b):\n"},
    "special tokens": {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
    "stop": {"prompt": "One, two, three,", "stop": ["five", "six"]},
    "stop, spaces": {"prompt": "def add(a, b):\n", "stop": ["\n\n", "    return"]},
    "one in a list": {"prompt": ["One, two,"]},
    "logprobs": {"prompt": "One, two,", "logprobs": 1, "max_tokens": 4},
    "echo": {"prompt": "One, two,", "echo": True, "max_tokens": 4},
}

CASES = [("chat", name, body) for name, body in CHATS.items()]
CASES += [("completions", name, body) for name, body in COMPLETIONS.items()]

FLEETING = {"id", "created", "model"}


def steady(answer: Any) -> Any:
    """Without what differs in each answer; floats to six places."""
    if isinstance(answer, dict):
        return {key: steady(value) for key, value in answer.items() if key not in FLEETING}
    if isinstance(answer, list):
        return [steady(each) for each in answer]
    return round(answer, 6) if isinstance(answer, float) else answer


def without_usage(answer: dict[str, Any]) -> Any:
    return steady({key: value for key, value in answer.items() if key != "usage"})


def assert_same_usage(counted: dict[str, int], own: dict[str, Any]) -> None:
    """Exactly; but where text is not ASCII a model may write a character in other tokens than its tokenizer does, and
    which text it writes depends on the machine: there, one token in sixteen may be counted wrong.
    """
    usage = own["usage"]
    tokens, wrong = usage["completion_tokens"], counted["completion_tokens"] - usage["completion_tokens"]
    assert abs(wrong) <= (0 if orjson.dumps(own["choices"]).isascii() else 1 + tokens // 16)
    assert counted == {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": tokens + wrong,
        "total_tokens": usage["total_tokens"] + wrong,
    }


def own_answer(through: Through, endpoint: Any, body: dict[str, Any]) -> Any:
    """Its own whole answer; what is not ASCII has the text of its own stream: after bytes that are no character, which
    a model may write on one machine and not on another, that loses what has several tokens. Not with `stop`, where its
    own stream would lose more: the proxy cuts for itself, and is compared with the whole answer.
    """
    own = through.own(endpoint, **body)
    assert own.status_code == 200, own.text
    answer = own.json()
    place = answer["choices"][0] if endpoint == "completions" else answer["choices"][0]["message"]
    name = "text" if endpoint == "completions" else "content"
    streams = through.dialect.asks_for_stream(through.request(endpoint, body)) and "stop" not in body
    if streams and not (place[name] or "").isascii():
        streamed = text_of(list(sse.parse_chunks(through.own(endpoint, **body, stream=True).content)))
        rest = iter(place[name])
        assert all(character in rest for character in streamed), "it loses characters, and changes nothing else"
        place[name] = streamed
    return answer


@pytest.mark.parametrize(("endpoint", "name", "body"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_llama_cpp_python(llama_cpp_python: Server, endpoint: Any, name: str, body: dict[str, Any]) -> None:
    through = Through("llama-cpp-python", llama_cpp_python.url, context=CONTEXT)
    body = {**GREEDY, **body}
    # From here on all begin with the prompt in its cache and its last token evaluated alone: the least difference in
    # the numbers lets a small model say something else.
    through.own(endpoint, **{**body, "max_tokens": 2})
    own = own_answer(through, endpoint, body)
    whole = through.ask(endpoint, **body)
    assert without_usage(whole) == without_usage(own)
    assert_same_usage(whole["usage"], own)
    assert whole["model"] == "public"

    chunks = through.stream(endpoint, **body, stream_options={"include_usage": True})
    assert_same_usage(chunks[-1]["usage"], own)
    assert chunks[-1]["choices"] == []
    choice = own["choices"][0]
    assert text_of(chunks) == (choice["text"] if endpoint == "completions" else choice["message"]["content"] or "")
    assert [each["finish_reason"] for chunk in chunks[:-1] for each in chunk["choices"]][-1] == choice["finish_reason"]
    assert {chunk["model"] for chunk in chunks} == {"public"}


@pytest.mark.parametrize("name", ["english", "korean", "conversation", "tool result", "forced tool"])
def test_counting_leaves_the_answer_in_the_cache(llama_cpp_python: Server, name: str) -> None:
    """A chat that is only refused touches no cache; one that is asked again costs the next turn its first token."""
    ways = [Through("llama-cpp-python", llama_cpp_python.url, context=context) for context in (CONTEXT, None)]
    counts = [through.ask("chat", **GREEDY, **CHATS[name])["usage"]["prompt_tokens"] for through in ways]
    assert counts[0] == counts[1]
    refused, asked = [[status for path, status in through.posts if "chat" in path] for through in ways]
    assert refused == [400, 400]
    assert asked == [200]
