"""/v1/responses with the openai SDK, in front of real engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from tests.support import real_servers as servers
from tests.support.documents import ROOT
from tests.support.proxied_backend import NEVER_ENDING, QUESTION, ProxiedBackend
from tests.support.real_servers import MODEL, Proxy, Server

ASK: dict[str, Any] = {
    "model": MODEL,
    "max_output_tokens": 12,
    "temperature": 0,
    "extra_body": {"repeat_penalty": 1.0, "seed": 1},
}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "strict": True,  # vLLM holds only a strict function to its schema
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Seoul"]}}, "required": ["city"]},
}


@pytest.fixture
def client(proxied: ProxiedBackend) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=proxied.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_response(client: openai.OpenAI) -> None:
    response = client.responses.create(input=QUESTION, instructions="You are a geographer.", **ASK)
    assert "Paris" in response.output_text
    assert response.model == MODEL
    assert response.usage is not None
    assert response.usage.input_tokens > 0
    assert response.usage.output_tokens > 0


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **ASK)
    with client.responses.stream(input=QUESTION, **ASK) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.status == whole.status
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens  # more of them may have been cached


async def test_the_asynchronous_client(proxied: ProxiedBackend) -> None:
    async with openai.AsyncOpenAI(base_url=proxied.url + "/v1", api_key="none", max_retries=0) as client:
        response = await client.responses.create(input=[{"role": "user", "content": QUESTION}], **ASK)
    assert "Paris" in response.output_text


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    ask = {**ASK, "max_output_tokens": 3, "extra_body": NEVER_ENDING}
    with client.responses.stream(input="Tell me a story.", **ask) as stream:
        last = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


class City(BaseModel):
    """What the model must say, and nothing else. The name is short, so that a small model has to end it."""

    name: str = Field(max_length=12)


def test_a_model_of_pydantic(client: openai.OpenAI) -> None:
    ask = {**ASK, "max_output_tokens": 64}
    parsed = client.responses.parse(input="The capital of France, as JSON: a short name.", text_format=City, **ask)
    assert parsed.status == "completed", parsed.output_text
    assert parsed.output_text.startswith("{")
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.name


def test_a_tool_that_must_be_called(client: openai.OpenAI, proxied: ProxiedBackend) -> None:
    """llama-server's template for this model has no tools, which is refused."""
    choice: Any = {"type": "function", "name": "weather"}
    ask = {**ASK, "max_output_tokens": 64, "tools": [TOOL], "tool_choice": choice}
    if proxied.kind == "llama_server":
        with pytest.raises(openai.BadRequestError, match="no backend"):
            client.responses.create(input="The weather in Paris?", **ask)
        return
    with client.responses.stream(input="The weather in Paris?", **ask) as stream:
        [call] = stream.get_final_response().output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Seoul")
    conversation: list[Any] = [
        {"role": "user", "content": "The weather in Paris?"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"},
    ]
    assert client.responses.create(input=conversation, **ASK).output_text


def test_what_codex_sends_is_understood(proxied: ProxiedBackend) -> None:
    """Without its tools, which this model does not have on each engine, and with few tokens, for the small context."""
    sent = json.loads((ROOT / "tests" / "fixtures" / "codex_request.json").read_text())
    sent |= {"model": MODEL, "tools": [{"type": "web_search"}], "max_output_tokens": 4}
    answer = proxied.post("/v1/responses", sent)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-dropped"] == "web_search"
    assert answer.text.rstrip().rpartition("event: ")[2].startswith(("response.completed", "response.incomplete"))


def test_the_engine_is_killed_and_the_response_goes_on(
    start_proxy: Callable[..., Proxy], llama_cpp_python: Server, template: Path, gguf: str, logs: Path
) -> None:
    doomed = servers.llama_server(logs / "doomed.log", gguf)
    doomed.start().wait_ready()
    env = {
        "XGEN_BACKENDS__FIRST__URLS": doomed.url,
        "XGEN_BACKENDS__FIRST__DIALECT": "llama-server",
        "XGEN_BACKENDS__FIRST__DEVICE_CLASS": "gpu",
        "XGEN_BACKENDS__SECOND__URLS": llama_cpp_python.url,
        "XGEN_BACKENDS__SECOND__DIALECT": "llama-cpp-python",
        "XGEN_BACKENDS__SECOND__CONTEXT": "2048",
        "XGEN_BACKENDS__SECOND__CHAT_TEMPLATE": str(template),
    }
    proxy = start_proxy(env=env)
    try:
        proxy.wait_ready()
        body = {"model": MODEL, "input": "Tell me a story.", "max_output_tokens": 100, "stream": True, **NEVER_ENDING}
        kinds: list[str] = []
        text = ""
        with httpx.stream("POST", f"{proxy.url}/v1/responses", json={**body, "backend": "first"}, timeout=60) as answer:
            assert answer.headers["x-backend"] == "first"
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                kinds.append(event["type"])
                if event["type"] == "response.output_text.delta":
                    text += event["delta"]
                if kinds.count("response.output_text.delta") == 5 and doomed.process and doomed.process.poll() is None:
                    doomed.kill9()
    finally:
        proxy.stop()
        doomed.stop()
    assert kinds.count("response.created") == 1
    assert kinds[-1] == "response.incomplete", kinds[-3:]
    assert event["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert event["response"]["output"][0]["content"][0]["text"] == text
