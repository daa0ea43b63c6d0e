"""LangChain: ChatOpenAI with a bound tool."""

from __future__ import annotations

from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from tasks import MODEL, URL, Json, run, saw, write_file

writer = tool(write_file)
model = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, max_retries=0, stream_usage=True)


def do(prompt: str) -> Json:
    messages: list[Any] = [("user", prompt)]
    while True:
        chunks = list(model.bind_tools([writer]).stream(messages))
        answer = sum(chunks[1:], chunks[0])
        if not answer.tool_calls:
            pieces, usage = [str(chunk.content) for chunk in chunks], answer.usage_metadata
            return saw(pieces, usage and (usage["input_tokens"], usage["output_tokens"]))
        messages += [answer, *(writer.invoke(call) for call in answer.tool_calls)]


run("langchain-openai", do)
