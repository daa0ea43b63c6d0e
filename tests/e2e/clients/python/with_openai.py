"""openai, synchronous: streamed chat completions, and a loop over tool calls."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI
from tasks import MODEL, TOOL, URL, Json, run, saw, write_file

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


def do(prompt: str) -> Json:
    messages: list[Any] = [{"role": "user", "content": prompt}]
    while True:
        with client.chat.completions.stream(
            model=MODEL,
            messages=messages,
            tools=[{"type": "function", "function": TOOL}],  # type: ignore[list-item]
            stream_options={"include_usage": True},
        ) as stream:
            pieces = [event.delta for event in stream if event.type == "content.delta"]
            answer = stream.get_final_completion()
        message, usage = answer.choices[0].message, answer.usage
        if not message.tool_calls:
            return saw(pieces, usage and (usage.prompt_tokens, usage.completion_tokens))
        messages.append(message)
        for call in message.tool_calls:
            result = write_file(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


run("openai", do)
