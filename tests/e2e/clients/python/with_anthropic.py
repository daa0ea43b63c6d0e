"""anthropic: streamed messages, and a loop over tool uses."""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic
from tasks import MODEL, TOOL, URL, Json, run, saw, write_file

client = Anthropic(base_url=URL, api_key="none", max_retries=0)
TOOLS: Any = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}]


def do(prompt: str) -> Json:
    messages: list[Any] = [{"role": "user", "content": prompt}]
    while True:
        with client.messages.stream(model=MODEL, max_tokens=1024, messages=messages, tools=TOOLS) as stream:
            pieces = list(stream.text_stream)
            answer = stream.get_final_message()
        uses = [block for block in answer.content if block.type == "tool_use"]
        if not uses:
            return saw(pieces, (answer.usage.input_tokens, answer.usage.output_tokens))
        messages.append({"role": "assistant", "content": answer.content})
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": write_file(**use.input)} for use in uses]
        messages.append({"role": "user", "content": results})


run("anthropic", do)
