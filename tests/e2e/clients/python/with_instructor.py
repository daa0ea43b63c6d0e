"""instructor: answers of a given form, streamed as they grow."""

from __future__ import annotations

from typing import Any

import instructor
from openai import OpenAI
from pydantic import BaseModel
from tasks import MODEL, URL, Json, run, write_file

openai = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
client = instructor.from_openai(openai, model=MODEL)
once = {"max_retries": 0}


class Answer(BaseModel):
    text: str


class WriteFile(BaseModel):
    """Write a text file."""

    path: str
    content: str


def do(prompt: str) -> Json:
    messages: list[Any] = [{"role": "user", "content": prompt}]
    if "Write" in prompt:
        task, raw = client.chat.completions.create_with_completion(messages=messages, response_model=WriteFile, **once)
        [call] = raw.choices[0].message.tool_calls
        result = write_file(task.path, task.content)
        said = raw.choices[0].message
        messages += [said.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": result}]
    grown = [each.text for each in client.chat.completions.create_partial(response_model=Answer, messages=messages)]
    answer, raw = client.chat.completions.create_with_completion(messages=messages, response_model=Answer, **once)
    usage = raw.usage.prompt_tokens, raw.usage.completion_tokens
    return {"text": answer.text, "pieces": len(set(grown)), "usage": usage}


run("instructor", do)
