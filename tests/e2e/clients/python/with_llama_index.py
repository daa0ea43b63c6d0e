"""LlamaIndex: OpenAILike, and its FunctionAgent for tools."""

from __future__ import annotations

import asyncio

from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.llms.openai_like import OpenAILike
from tasks import MODEL, URL, Json, run, saw, write_file


async def do(prompt: str) -> Json:
    model = OpenAILike(
        model=MODEL,
        api_base=f"{URL}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        additional_kwargs={"stream_options": {"include_usage": True}},
    )
    handler = FunctionAgent(tools=[write_file], llm=model).run(prompt)
    pieces, usage = [], None
    async for event in handler.stream_events():
        if isinstance(event, AgentStream):
            pieces.append(event.delta)
            counted = (event.raw or {}).get("usage")
            usage = (counted["prompt_tokens"], counted["completion_tokens"]) if counted else usage
    await handler
    return saw(pieces, usage)


run("llama-index-core", lambda prompt: asyncio.run(do(prompt)))
