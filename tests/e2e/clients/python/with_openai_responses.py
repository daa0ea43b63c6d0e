"""openai, synchronous: the Responses API, which keeps no state here (`store=False`)."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI
from tasks import MODEL, TOOL, URL, Json, run, saw, write_file

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


def do(prompt: str) -> Json:
    items: list[Any] = [{"role": "user", "content": prompt}]
    while True:
        with client.responses.stream(
            model=MODEL,
            input=items,
            tools=[{"type": "function", **TOOL}],  # type: ignore[list-item]
            store=False,
        ) as stream:
            pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
            answer = stream.get_final_response()
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            usage = answer.usage
            return saw(pieces, usage and (usage.input_tokens, usage.output_tokens))
        items += answer.output
        for call in calls:
            result = write_file(**json.loads(call.arguments))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})


run("openai", do)
