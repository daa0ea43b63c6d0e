from __future__ import annotations

from typing import Any

import pytest

from tests.support.chunks import LLAMA_CPP_PYTHON, TOOLS, Replica, call, delta, make_request, text
from xgen_proxy.dialects.llama_cpp_python.token_usage import TokenCounter
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import Json


async def counted(*pieces: Json, endpoint: Any = "chat", replica: Replica | None = None, **fields: Any) -> Json:
    counter = TokenCounter(make_request(endpoint, **fields), LLAMA_CPP_PYTHON.prepared)
    for piece in pieces:
        counter.add(piece)
    return await counter.usage((replica or Replica()).post)


async def test_a_chunk_of_ascii_is_a_token() -> None:
    pieces = [delta(role="assistant"), delta(content="a"), delta(content="bcd"), delta(content=""), delta("stop")]
    assert await counted(*pieces) == {"prompt_tokens": 37, "completion_tokens": 3, "total_tokens": 40}


async def test_other_text_is_tokenized_in_stretches() -> None:
    replica = Replica(before=1)
    pieces = [delta(content=piece) for piece in ("a", "안", "녕하", " b", "😀", "")]
    usage = await counted(*pieces, replica=replica)
    assert usage["completion_tokens"] == 1 + 3 + 1 + 1 + 1
    assert [body["input"] for path, body in replica.asked if "tokenize" in path] == ["안녕하", "", "😀", ""]


async def test_never_fewer_tokens_than_chunks() -> None:
    class Odd(Replica):
        async def post(self, path: str, body: Json) -> tuple[int, Any]:
            return (200, {"count": 0}) if "tokenize" in path else await super().post(path, body)

    assert (await counted(delta(content="é"), delta(content="é"), replica=Odd()))["completion_tokens"] == 2


async def test_with_logprobs_each_chunk_is_a_token() -> None:
    usage = await counted(delta(content="안"), delta(content=""), logprobs=True)
    assert usage["completion_tokens"] == 2


async def test_the_closing_chunk_of_a_call_is_not_a_token() -> None:
    usage = await counted(call("{"), call("}"), call(""), delta("tool_calls"), **TOOLS)
    assert usage["completion_tokens"] == 2


async def test_the_prompt_of_a_completion_is_tokenized() -> None:
    replica = Replica()
    usage = await counted(text("a"), text("", "stop"), endpoint="completions", prompt="Once", replica=replica)
    assert usage == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
    assert {path for path, _ in replica.asked} == {"/extras/tokenize/count"}


async def test_a_chat_is_asked_again_with_every_field_its_template_reads() -> None:
    replica = Replica()
    await counted(replica=replica, stop=["a"], response_format={"type": "json_object"}, **TOOLS)
    [(path, body)] = replica.asked
    assert path == "/v1/chat/completions"
    assert set(body) == {"model", "messages", "tools", "tool_choice", "max_tokens"}
    assert body["max_tokens"] == 1


class Template(Replica):
    """Refuses chats of 50 tokens or more. Its template adds 7 tokens; each character is a token, and so is each padding
    word. Long chats have `odd` tokens more."""

    def __init__(self, odd: int = 0) -> None:
        super().__init__()
        self.odd = odd

    async def post(self, path: str, body: Json) -> tuple[int, Any]:
        text, *words = body["messages"][-1]["content"].split(" word")
        count = 7 + len(text) + len(words) + (self.odd if len(words) > 50 else 0)
        self.asked.append((path, body))
        if count < 50:
            return 200, {"usage": {"prompt_tokens": count}}
        return 400, {"error": {"message": f"you requested {count + 1} tokens ({count} in the messages, 1 in …)"}}


async def test_the_prompt_of_a_chat_is_counted_by_refusals() -> None:
    replica = Template()
    usage = await counted(delta(content="a"), replica=replica, context=50)
    assert usage["prompt_tokens"] == 9
    assert [len(body["messages"][0]["content"]) for _, body in replica.asked] == [2 + 5 * 50, 2 + 10 * 50]


@pytest.mark.parametrize(
    ("replica", "content"), [(Template(), "Hi "), (Template(), ""), (Template(odd=1), "Hi"), (Replica(), "Hi")]
)
async def test_without_the_expected_refusals_the_chat_is_asked_again(replica: Replica, content: str) -> None:
    usage = await counted(replica=replica, context=50, messages=[{"role": "user", "content": content}])
    assert usage["prompt_tokens"] == (37 if type(replica) is Replica else 7 + len(content))
    assert replica.asked[-1][1]["messages"] == [{"role": "user", "content": content}]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_a_failed_count_raises(endpoint: Any) -> None:
    with pytest.raises(UpstreamProtocolError):
        await counted(endpoint=endpoint, replica=Replica(status=500))
