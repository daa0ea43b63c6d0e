"""Anthropic's SDK, unchanged except for `base_url`, against real backends, and against a scripted one for what a model
of 135M parameters does not do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import beta_tool
from anthropic.types import MessageParam, TextBlockParam, ToolParam

from tests.support import real_servers as servers
from tests.support.commit_point import seen, until_seen
from tests.support.fake_upstream import FakeUpstream, Talk, delta, status
from tests.support.proxied_backend import QUESTION, ProxiedBackend
from tests.support.real_servers import CONTEXT, MODEL, Proxy, Server
from xgen_proxy.api.api_keys import new_key

Json = dict[str, Any]
StartProxy = Callable[..., Proxy]
FRANCE: list[MessageParam] = [{"role": "user", "content": QUESTION}]
GREEDY: Json = {"temperature": 0}  # newer SDKs have no argument for it
ASK: Json = {"model": MODEL, "max_tokens": 12, "messages": FRANCE, "extra_body": GREEDY}
WEATHER: ToolParam = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def client_of(url: str, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def proxy(llama_server: Server, start_proxy: StartProxy) -> Proxy:
    proxy = start_proxy("--llama-cpp", llama_server.url, "--engine", "llama-server")
    proxy.wait_ready()
    return proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[anthropic.Anthropic]:
    with client_of(proxy.url) as client:
        yield client


@pytest.fixture
def each(proxied: ProxiedBackend) -> Iterator[anthropic.Anthropic]:
    """A client of each kind of backend."""
    with client_of(proxied.url) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# -- real backends -----------------------------------------------------------------------------------------------------


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASK)
    assert "Paris" in text_of(message)
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 20
    assert message.usage.output_tokens > 1
    assert message.id == f"msg_{message._request_id}"


def test_a_stream_says_the_same(each: anthropic.Anthropic) -> None:
    whole = each.messages.create(**ASK)
    with each.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == text_of(message) == text_of(whole)
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert total(message) == total(whole)


def total(message: Any) -> int:
    """Input tokens, wherever they came from."""
    return int(message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0))


def test_the_events_of_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.create(**ASK, stream=True) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0].type == "message_start"
    assert events[0].message.usage.input_tokens > 0


def test_the_asynchronous_client(proxy: Proxy) -> None:
    async def ask() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="none", max_retries=0) as client:
            whole = await client.messages.create(**ASK)
            async with client.messages.stream(**ASK) as stream:
                return text_of(whole), await stream.get_final_text()

    whole, streamed = asyncio.run(ask())
    assert "Paris" in whole
    assert streamed == whole


def test_blocks_and_a_system_prompt(client: anthropic.Anthropic) -> None:
    """All that is dropped or merged without loss."""
    cache: Any = {"type": "ephemeral"}
    system: list[TextBlockParam] = [
        {"type": "text", "text": "You are terse.", "cache_control": cache},
        {"type": "text", "text": "You know geography."},
    ]
    messages: list[MessageParam] = [
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": QUESTION, "cache_control": cache}]},
    ]
    answer = client.messages.with_raw_response.create(
        model=MODEL,
        max_tokens=12,
        messages=messages,
        system=system,
        thinking={"type": "disabled"},
        metadata={"user_id": "user_a_account_b_session_c"},
        extra_body={**GREEDY, "top_k": 40, "context_management": {"edits": []}},
    )
    assert answer.headers["x-dropped"] == "context_management"
    assert answer.parse().usage.output_tokens > 0


def test_why_it_stopped(each: anthropic.Anthropic, proxied: ProxiedBackend) -> None:
    short = each.messages.create(**{**ASK, "max_tokens": 2})
    assert short.stop_reason == "max_tokens"
    stopped = each.messages.create(**ASK, stop_sequences=["Paris"])
    assert "Paris" not in text_of(stopped)
    if proxied.kind == "vllm":  # the only one that says which
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    else:
        assert stopped.stop_reason == "end_turn"


def test_a_prefilled_answer_goes_on(each: anthropic.Anthropic, proxied: ProxiedBackend) -> None:
    messages: list[MessageParam] = [*FRANCE, {"role": "assistant", "content": "The capital of France is"}]
    if proxied.kind == "llama_cpp_python":  # it would start a new turn
        with pytest.raises(anthropic.BadRequestError, match="cannot do continue_final_message"):
            each.messages.create(**{**ASK, "messages": messages})
    else:
        assert text_of(each.messages.create(**{**ASK, "messages": messages})).startswith(" Paris")


def test_tokens_are_counted(each: anthropic.Anthropic, proxied: ProxiedBackend) -> None:
    counted = each.messages.count_tokens(model=MODEL, system="You are terse.", messages=FRANCE).input_tokens
    used = total(each.messages.create(**ASK, system="You are terse."))
    if proxied.kind == "llama_cpp_python":  # an estimate, which knows no template
        assert used / 3 < counted < used * 2
    else:
        assert counted == used


def test_models(client: anthropic.Anthropic) -> None:
    [model] = client.models.list(limit=1000).data
    assert (model.id, model.type, model.max_input_tokens) == (MODEL, "model", CONTEXT)
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(**{**ASK, "model": "none"})
    assert unknown.value.type == "not_found_error"
    assert unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 2048 maximum"):
        client.messages.create(**{**ASK, "messages": [{"role": "user", "content": "word " * 4000}]})
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.role"):
        client.messages.create(**{**ASK, "messages": [{"role": "robot", "content": "Hi"}]})


def test_a_key(llama_server: Server, start_proxy: StartProxy) -> None:
    key, hash = new_key()
    proxy = start_proxy("--llama-cpp", llama_server.url, "--engine", "llama-server", env={"XGEN_API_KEYS": hash})
    proxy.wait_ready()
    with client_of(proxy.url, key) as client:
        assert client.messages.create(**{**ASK, "max_tokens": 1}).usage.output_tokens == 1
        assert client.with_options(api_key=None, auth_token=key).models.list().data
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="sk-ant-other").messages.create(**ASK)


# -- the attribution of Claude Code ------------------------------------------------------------------------------------

RULES = " ".join(f"Rule {number}: answer in {number} words or fewer." for number in range(1, 11))


def cached_tokens(url: str, hash: str, name: str) -> tuple[int, int]:
    """(from the cache, all) of a request with this hash in its attribution."""
    header = f"x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=sdk-cli; cch={hash};"
    texts = [header, f"You are {name}, a coding agent. {RULES}"]
    system: list[TextBlockParam] = [{"type": "text", "text": text} for text in texts]
    with client_of(url) as client:
        usage = client.messages.create(**{**ASK, "max_tokens": 1}, system=system).usage
    cached = usage.cache_read_input_tokens or 0
    return cached, cached + usage.input_tokens


def test_the_attribution_does_not_empty_the_prefix_cache(
    llama_server: Server, start_proxy: StartProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two requests of a session, which differ in the header's hash only."""
    found = {}
    for strip in ("true", "false"):
        env = {"XGEN_STRIP_ATTRIBUTION": strip}
        proxy = start_proxy("--llama-cpp", llama_server.url, "--engine", "llama-server", env=env)
        proxy.wait_ready()
        cached_tokens(proxy.url, "36ee5", f"Agent {strip}")
        found[strip] = cached_tokens(proxy.url, "0aaa9", f"Agent {strip}")
    with capsys.disabled():
        print(f"\ncached tokens of the second request, stripped and not: {found['true']}, {found['false']}")
    (stripped, all_stripped), (kept, all_kept) = found["true"], found["false"]
    assert stripped >= all_stripped - 2  # llama-server computes the last tokens again
    assert kept < all_kept / 2


# -- a killed engine ---------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_when_its_engine_is_killed(
    llama_server: Server, start_proxy: StartProxy, gguf: str, tmp_path: Path
) -> None:
    doomed = servers.llama_server(tmp_path / "doomed.log", gguf).start().wait_ready()
    env = {
        "XGEN_BACKENDS__FIRST__URLS": doomed.url,
        "XGEN_BACKENDS__FIRST__DIALECT": "llama-server",
        "XGEN_BACKENDS__FIRST__DEVICE_CLASS": "gpu",
        "XGEN_BACKENDS__SECOND__URLS": llama_server.url,
        "XGEN_BACKENDS__SECOND__DIALECT": "llama-server",
    }
    try:
        proxy = start_proxy(env=env)
        proxy.wait_ready()
        story: list[MessageParam] = [{"role": "user", "content": "Tell me a long story about a red fox."}]
        with (
            client_of(proxy.url) as client,
            client.messages.stream(
                model=MODEL, max_tokens=64, messages=story, extra_body={**GREEDY, "backend": "first"}
            ) as stream,
        ):
            assert stream.response.headers["x-backend"] == "first"
            pieces = stream.text_stream
            text = "".join(next(pieces) for _ in range(5))
            doomed.kill9()
            text += "".join(pieces)
            message = stream.get_final_message()
    finally:
        doomed.stop()
    assert text == text_of(message)
    assert len(text.split()) > 10
    assert message.stop_reason in ("end_turn", "max_tokens")


# -- a scripted backend ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Iterator[FakeUpstream]:
    fake = FakeUpstream(models=[MODEL])
    yield fake
    fake.close()


@pytest.fixture
def scripted(script: FakeUpstream, start_proxy: StartProxy) -> Iterator[anthropic.Anthropic]:
    proxy = start_proxy("--vllm", script.url)
    proxy.wait_ready()
    script.talks.clear()
    with client_of(proxy.url) as client:
        yield client
    proxy.stop()


def calls(*pieces: Json, finish: str | None = None) -> Json:
    chunk = delta(finish=finish)
    chunk["choices"][0]["delta"] = {"tool_calls": list(pieces)}
    return chunk


def piece(index: int, arguments: str = "", **head: str) -> Json:
    function = {"arguments": arguments, **({"name": head["name"]} if "name" in head else {})}
    return {"index": index, **({"id": head["id"]} if "id" in head else {}), "function": function}


def reasons(text: str) -> Json:
    chunk = delta()
    chunk["choices"][0]["delta"] = {"reasoning": text}
    return chunk


async def thinks_and_calls(talk: Talk) -> None:
    """Asks for the weather in two cities at once, and answers once it has both."""
    body = talk.json
    results = [message["content"] for message in body["messages"] if message["role"] == "tool"]
    chunks = [delta(f"It is {' and '.join(results)}."), delta(finish="stop")]
    if not results:
        chunks = [
            reasons("Two "),
            reasons("cities."),
            delta("I look."),
            calls(piece(0, name="weather", id="call_1"), piece(1, name="weather", id="call_2")),
            calls(piece(0, '{"city": '), piece(1, '{"city": ')),
            calls(piece(0, '"Paris"}'), piece(1, '"Rome"}')),
            delta(finish="tool_calls"),
        ]
    if body.get("stream"):
        await talk.start_stream()
        for chunk in chunks:
            await talk.event(chunk)
        await talk.end()
        return
    await talk.answer(200, as_whole(bool(results), " and ".join(results)))


def as_whole(done: bool, weather: str) -> Json:
    def call(id: str, city: str) -> Json:
        arguments = json.dumps({"city": city})
        return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}

    message: Json = {"role": "assistant", "content": f"It is {weather}."}
    if not done:
        asked = [call("call_1", "Paris"), call("call_2", "Rome")]
        message = {"role": "assistant", "content": "I look.", "reasoning": "Two cities.", "tool_calls": asked}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if done else "tool_calls"}
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
    return {**head, "choices": [choice], "usage": usage}


@pytest.mark.parametrize("stream", [True, False])
def test_thoughts_and_parallel_tool_calls(scripted: anthropic.Anthropic, script: FakeUpstream, stream: bool) -> None:
    script.default = thinks_and_calls
    conversation: list[MessageParam] = [{"role": "user", "content": "The weather in Paris and Rome?"}]

    def ask() -> Any:
        fields: Json = {"model": MODEL, "max_tokens": 100, "messages": conversation, "tools": [WEATHER]}
        if not stream:
            return scripted.messages.create(**fields)
        with scripted.messages.stream(**fields) as events:
            return events.get_final_message()

    message = ask()
    assert message.stop_reason == "tool_use"
    thought, text, first, second = message.content
    assert (thought.type, thought.thinking, bool(thought.signature)) == ("thinking", "Two cities.", True)
    assert text.text == "I look."
    assert [(use.id, use.name, use.input) for use in (first, second)] == [
        ("call_1", "weather", {"city": "Paris"}),
        ("call_2", "weather", {"city": "Rome"}),
    ]
    results: Any = [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"},
        {"type": "tool_result", "tool_use_id": "call_2", "content": [{"type": "text", "text": "rainy"}]},
    ]
    conversation += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    assert text_of(ask()) == "It is sunny and rainy."
    roles = [each["role"] for each in script.talks[-1].json["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]


def test_the_sdk_runs_the_tools(scripted: anthropic.Anthropic, script: FakeUpstream) -> None:
    """Its own loop, with ?beta=true."""
    script.default = thinks_and_calls

    @beta_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return {"Paris": "sunny", "Rome": "rainy"}[city]

    runner = scripted.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=100,
        tools=[weather],
        messages=[{"role": "user", "content": "The weather in Paris and Rome?"}],
    )
    assert text_of(runner.until_done()) == "It is sunny and rainy."


def test_an_overload_and_a_broken_stream(scripted: anthropic.Anthropic, script: FakeUpstream) -> None:
    async def breaks(talk: Talk) -> None:
        await talk.start_stream()
        await talk.event(delta("I be"))
        await until_seen()
        await talk.event({"error": {"message": "gone", "type": "InternalServerError", "code": 500}})
        await talk.end()

    script.default = breaks
    seen.clear()
    opted_out = scripted.messages.stream(
        model=MODEL, max_tokens=9, messages=FRANCE, extra_body={"continuation": "none"}
    )
    with opted_out as stream:
        next(iter(stream))
        seen.set()
        with pytest.raises(anthropic.APIStatusError) as broken:
            stream.until_done()
    assert broken.value.type == "api_error"
    script.default = status(503)
    with pytest.raises(anthropic.APIStatusError) as full:
        scripted.messages.create(**ASK)
    assert (full.value.status_code, full.value.type) == (529, "overloaded_error")
