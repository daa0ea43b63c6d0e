"""openai, asynchronous: raw chunks, put together by hand."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openai import AsyncOpenAI
from tasks import MODEL, TOOL, URL, Json, run, saw, write_file


async def do(prompt: str) -> Json:
    messages: list[Any] = [{"role": "user", "content": prompt}]
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        while True:
            pieces, calls, usage = [], [], None
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=messages,
                tools=[{"type": "function", "function": TOOL}],  # type: ignore[list-item]
                stream=True,
                stream_options={"include_usage": True},
            ):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    pieces.append(choice.delta.content or "")
                    for part in choice.delta.tool_calls or ():
                        if part.id:
                            calls.append({"id": part.id, "type": "function", "function": {"name": "", "arguments": ""}})
                        function = calls[part.index]["function"]
                        function["name"] += part.function.name or ""
                        function["arguments"] += part.function.arguments or ""
            if not calls:
                return saw(pieces, usage and (usage.prompt_tokens, usage.completion_tokens))
            messages.append({"role": "assistant", "content": "".join(pieces), "tool_calls": calls})
            for call in calls:
                result = write_file(**json.loads(call["function"]["arguments"]))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


run("openai", lambda prompt: asyncio.run(do(prompt)))
