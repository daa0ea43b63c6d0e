"""Requests of every form that the SDKs' types describe: passed on, or refused in words of the API."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anthropic
import openai
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.audio import transcription_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_token_count_params, response_create_params

from tests.support.fake_upstream import FakeUpstream, Talk, good
from tests.support.running_proxy import RunningProxy, backend, running_proxy
from tests.support.sdk_shapes import Shape, shapes

Client = Any  # of either SDK


class Method(NamedTuple):
    """`refusals`: patterns of all messages with which a shape may be refused; each occurs. `never`: fields that are
    refused whenever they are sent, which a request with all fields leaves out."""

    params: type
    refusals: tuple[str, ...] = ()
    always: tuple[tuple[str, str], ...] = ()
    never: tuple[str, ...] = ()
    streams: bool = True


NO_STREAM = r"stream_options goes with stream: true only"
ROLE = r"messages\.\d\.content\.\d\.(content\.\d\.)?type must be text, .*, not '\w+'"  # a block of another role
RESPONSES = (
    r"(previous_response_id|conversation) cannot be used here, because this proxy keeps nothing; .*",
    r"input is (missing|empty); send .*",
    r"input\.0 has the type '\w+'; this proxy takes .*",  # that only OpenAI's own tools write
    r"input\.0 refers to an item by its id, but this proxy keeps no items; .*",
    r"tool_choice is required, but tools has no function",
    r"tool_choice must name a function or a custom tool that is in tools: .*",
    r"input\.0\.call_id is missing: it joins a call and its output",
    r"input\.0\.(content|output)\.0\.(image_url|file_data) (is missing; send|must be a data URL, such as) .*",
)
ANTHROPIC = (
    ROLE,
    r"messages have no content",  # none that an engine could read
    r"messages\.0\.content\.0\.(content\.0\.)?source must be of type base64 or url; there is no file storage here",
    r"tool_choice\.name must be one of the tools with an input_schema, not 'string'",
)
METHODS = {
    "openai.chat.completions.create": Method(
        chat_create_params.CompletionCreateParamsNonStreaming,
        (
            NO_STREAM,
            r"no backend can do this request with the model 'm': vllm cannot do (audio|files)",
            r"messages\.0\.content\.0\.file\.file_data must be a data URL, .*",
            r"this backend ignores functions: use tools and tool_choice",
        ),
        never=("stream_options", "functions"),
    ),
    "openai.completions.create": Method(
        completion_create_params.CompletionCreateParamsNonStreaming,
        (NO_STREAM, r"prompt is missing; send a string"),
        never=("stream_options",),
    ),
    "openai.embeddings.create": Method(embedding_create_params.EmbeddingCreateParams, streams=False),
    "openai.audio.transcriptions.create": Method(
        transcription_create_params.TranscriptionCreateParamsNonStreaming, streams=False
    ),
    "openai.responses.create": Method(
        response_create_params.ResponseCreateParamsNonStreaming,
        (
            *RESPONSES,
            r"prompt cannot .*",
            r"background must be false or absent, because this proxy keeps no responses; .*",
        ),
        always=(("model", "m"), ("input", "Hi")),
        never=("previous_response_id", "conversation", "prompt", "background"),
    ),
    "openai.responses.input_tokens.count": Method(
        input_token_count_params.InputTokenCountParams,
        RESPONSES,
        always=(("model", "m"), ("input", "Hi")),
        never=("previous_response_id", "conversation"),
        streams=False,
    ),
    "anthropic.messages.create": Method(message_create_params.MessageCreateParamsNonStreaming, ANTHROPIC),
    "anthropic.messages.count_tokens": Method(
        message_count_tokens_params.MessageCountTokensParams, ANTHROPIC, streams=False
    ),
    "anthropic.beta.messages.create": Method(
        beta_message_create_params.MessageCreateParamsNonStreaming,
        (*ANTHROPIC, r"messages\.0\.content must be a string or an array of blocks"),
    ),
}


async def engine(talk: Talk) -> None:
    """Answers on each route in the shape that its client reads."""
    usage = {"prompt_tokens": 3, "total_tokens": 4}
    if talk.path.startswith("/v1/chat/completions"):
        await good(talk)
    elif talk.path == "/v1/completions":
        choice = {"index": 0, "text": "hello", "finish_reason": "stop", "logprobs": None}
        answer = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
        if talk.json.get("stream"):
            await talk.start_stream()
            await talk.event(answer)
            await talk.end()
        else:
            await talk.answer(200, {**answer, "usage": {**usage, "completion_tokens": 1}})
    elif talk.path == "/v1/embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        await talk.answer(200, {"object": "list", "model": "m", "data": data, "usage": usage})
    elif talk.path == "/tokenize":
        await talk.answer(200, {"count": 3, "tokens": [1, 2, 3]})
    else:
        heard = {"text": "hello", "task": "transcribe", "language": "en", "duration": 1.0, "segments": []}
        await talk.answer(200, heard)


@pytest.fixture(scope="module")
def proxy(fake: FakeUpstream) -> Iterator[RunningProxy]:
    fake.default, fake.sees = engine, True
    with running_proxy(backends={"vllm": backend(fake, embeddings=True)}) as running:
        yield running


@pytest.fixture(scope="module")
def clients(proxy: RunningProxy) -> Iterator[dict[str, Client]]:
    """They check each answer against its type."""
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
    with (
        openai.OpenAI(base_url=f"{proxy.url}/v1", **options) as of_openai,
        anthropic.Anthropic(base_url=proxy.url, **options) as of_anthropic,
    ):
        yield {"openai": of_openai, "anthropic": of_anthropic}


def method_of(clients: dict[str, Client], name: str) -> Callable[..., Any]:
    sdk, *path = name.split(".")
    called: Callable[..., Any] = functools.reduce(getattr, path, clients[sdk])
    return called


def refusal(call: Callable[..., Any], shape: Shape) -> str | None:
    """What the client is told, if the request is refused. Any other failure is raised."""
    try:
        answer = call(**shape)
        if shape.get("stream"):
            assert [*answer], "a stream without events"
        return None
    except (openai.BadRequestError, anthropic.BadRequestError) as error:
        body: Any = error.body
        told = body.get("error", body)  # OpenAI's SDK unwraps it
        assert told["type"] == "invalid_request_error", body
        return str(told["message"])


@pytest.mark.parametrize("name", METHODS)
def test_each_shape_passes_or_is_refused_for_a_known_reason(clients: dict[str, Client], name: str) -> None:
    method, call = METHODS[name], method_of(clients, name)
    tried = [*shapes(method.params, dict(method.always), method.never)]
    if method.streams:
        tried += [{**shape, "stream": True} for shape in (tried[0], tried[-1])]
    told = [refusal(call, shape) for shape in tried]
    assert [told[0], told[-1]] == [None, None], "the required fields, and all fields"
    used = set()
    for shape, message in zip(tried, told, strict=True):
        if message is not None:
            reasons = [pattern for pattern in method.refusals if re.fullmatch(pattern, message)]
            assert reasons, (message, shape)
            used |= {*reasons}
    assert used == {*method.refusals}
