"""Common clients, unchanged except for `base_url`, against each backend."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.e2e.clients.installed import NODE, NotInstalledError, install_node
from tests.support.proxied_backend import CAPITAL, GREEDY, QUESTION, ProxiedBackend
from tests.support.real_servers import MODEL
from tests.support.unavailable import unavailable

ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": CAPITAL,
    "max_tokens": 12,
    "temperature": 0,
    "seed": 1,
    "extra_body": {"repeat_penalty": 1.0},
}


@pytest.fixture
def client(proxied: ProxiedBackend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=proxied.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def langchain(proxied: ProxiedBackend) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=proxied.url + "/v1",
        api_key="none",
        model=MODEL,
        max_retries=0,
        max_completion_tokens=48,
        temperature=0,
        stream_usage=True,
        extra_body={"repeat_penalty": 1.0},
    )


def test_sdk_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_sdk_chat_stream_has_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert all(chunk.usage is None for chunk in chunks)


def test_sdk_completions(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 8, **GREEDY}
    ask["extra_body"] = {"repeat_penalty": ask.pop("repeat_penalty")}
    whole = client.completions.create(**ask)
    assert whole.object == "text_completion"
    assert "four" in whole.choices[0].text
    streamed = list(client.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == whole.choices[0].text


def test_sdk_raw_responses_have_routing_headers(client: openai.OpenAI, proxied: ProxiedBackend) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASK)
    headers = raw.headers
    assert raw.parse().choices
    assert headers["X-Request-Id"]
    assert headers["X-Backend"] == proxied.name
    assert headers["X-Replica"]
    assert headers["X-Route-Reason"]
    assert headers["X-Attempts"] == "1"
    assert 0 <= float(headers["X-Overhead-Ms"]) < 1000


def test_sdk_streaming_raw_responses_have_routing_headers(client: openai.OpenAI, proxied: ProxiedBackend) -> None:
    with client.chat.completions.with_streaming_response.create(**ASK, stream=True) as raw:
        assert raw.headers["X-Backend"] == proxied.name
        assert raw.headers["X-Request-Id"]
        assert raw.headers["Content-Type"].startswith("text/event-stream")
        assert raw.headers["X-Accel-Buffering"] == "no"
        assert list(raw.iter_lines())[-2:] == ["data: [DONE]", ""]


def test_sdk_parses_structured_output(client: openai.OpenAI) -> None:
    class City(BaseModel):
        name: Literal["Paris", "Rome"]

    answer = client.chat.completions.parse(**{**ASK, "max_tokens": 48}, response_format=City)
    assert answer.choices[0].message.parsed in (City(name="Paris"), City(name="Rome"))


def test_sdk_request_ids_are_kept(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASK, extra_headers={"X-Request-Id": "my-own-id.1"})
    assert raw.headers["X-Request-Id"] == "my-own-id.1"


def test_errors_raise_the_sdks_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**{**ASK, "model": "nope"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": "word " * 4000}]})
    assert long.value.code == "context_length_exceeded"


async def test_async_sdk_several_at_once(proxied: ProxiedBackend) -> None:
    async with openai.AsyncOpenAI(base_url=proxied.url + "/v1", api_key="none", max_retries=0) as client:

        async def streamed() -> str:
            stream = await client.chat.completions.create(**ASK, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def whole() -> str:
            answer = await client.chat.completions.create(**ASK)
            return str(answer.choices[0].message.content)

        texts = await asyncio.gather(streamed(), whole(), streamed(), whole())
    assert all("Paris" in text for text in texts)


def test_langchain_invoke(langchain: ChatOpenAI, proxied: ProxiedBackend) -> None:
    answer = langchain.invoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0


def test_langchain_stream(langchain: ChatOpenAI) -> None:
    chunks = list(langchain.stream(QUESTION))
    assert "Paris" in "".join(str(chunk.content) for chunk in chunks)
    assert len([chunk for chunk in chunks if chunk.content]) > 1
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(used) == 1
    assert used[0]["output_tokens"] > 0


def test_langchain_batch(langchain: ChatOpenAI) -> None:
    answers = langchain.batch([QUESTION, "Name three colours."])
    assert "Paris" in answers[0].content
    assert answers[1].content not in ("", answers[0].content)


def test_langchain_structured_output(langchain: ChatOpenAI) -> None:
    class Colour(BaseModel):
        """A colour."""

        name: Literal["red", "green"]

    answer = langchain.with_structured_output(Colour).invoke("Name a colour.")
    assert isinstance(answer, Colour)


@pytest.fixture(scope="session")
def node() -> str:
    """The Node executable, with the client of tests/e2e/clients/node installed."""
    try:
        install_node()
    except NotInstalledError as error:
        unavailable(f"NOT TESTED WITH THE NODE CLIENT: {error}")
    return shutil.which("node") or "node"


def test_node_sdk_stream(node: str, proxied: ProxiedBackend) -> None:
    command = [node, "chat.mjs", proxied.url + "/v1", MODEL]
    run = subprocess.run(command, cwd=NODE, timeout=60, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert "Paris" in seen["text"]
    assert seen["finish"] in ("stop", "length")
    assert seen["usage"]["completion_tokens"] > 0
    assert seen["backend"] == proxied.name
    assert seen["unknown"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}


def curl(*args: str) -> str:
    run = subprocess.run(["curl", "-sS", "--max-time", "30", *args], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_curl(proxied: ProxiedBackend) -> None:
    ask = json.dumps({"model": MODEL, "messages": CAPITAL, "max_tokens": 12, **GREEDY})
    url = proxied.url + "/v1/chat/completions"
    answer = json.loads(curl(url, "-H", "Content-Type: application/json", "-d", ask))
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_curl_stream_ends_with_done(proxied: ProxiedBackend) -> None:
    ask = json.dumps({"model": MODEL, "messages": CAPITAL, "max_tokens": 4, "stream": True, **GREEDY})
    out = curl("-N", proxied.url + "/v1/chat/completions", "-H", "Content-Type: application/json", "-d", ask)
    events = [line.removeprefix("data: ") for line in out.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])
