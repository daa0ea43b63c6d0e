"""pydantic-ai: an agent with a tool, streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from typing import Any

from pydantic_ai import Agent, PartDeltaEvent, TextPartDelta
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tasks import MODEL, URL, Json, run, saw, write_file

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))
agent = Agent(model, tools=[write_file])


async def do(prompt: str) -> Json:
    pieces: list[str] = []

    async def see(_: Any, events: AsyncIterable[Any]) -> None:
        deltas = [event.delta async for event in events if isinstance(event, PartDeltaEvent)]
        pieces.extend(delta.content_delta for delta in deltas if isinstance(delta, TextPartDelta))

    result = await agent.run(prompt, event_stream_handler=see)
    usage = result.response.usage
    return {**saw(pieces, (usage.input_tokens, usage.output_tokens)), "text": result.output}


run("pydantic-ai-slim", lambda prompt: asyncio.run(do(prompt)))
