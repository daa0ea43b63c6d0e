"""What routing needs to know of a request, read once from its JSON body. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Endpoint = Literal["chat", "completions", "embeddings"]
Urgency = Literal["high", "normal", "low"]

Need = Literal[
    "embeddings",  # the /v1/embeddings endpoint
    "images",  # any image, audio or file content part
    "tools",  # tools that the model itself chooses from (tool_choice auto, required or absent)
    "forced_tool",  # tool_choice names the function
    "n",  # several choices (n or best_of > 1)
    "logprobs",
    "json_object",
    "json_schema",
    "grammar",  # llama.cpp's own field
    "structured_outputs",  # vLLM's own field
    "prompt_list",  # several prompts in one /v1/completions
    "token_ids",  # a prompt as token ids
    "echo",
    "suffix",
]


@dataclass(frozen=True, slots=True)
class Features:
    """`prompt_tokens` is an estimate (see estimate_tokens); `max_tokens` is None where the client set none."""

    endpoint: Endpoint
    model: str | None
    prompt_words: int
    prompt_tokens: int
    max_tokens: int | None
    stream: bool
    include_usage: bool
    needs: frozenset[Need]
    backend: str | None  # None: auto
    urgency: Urgency
    task_type: str | None
    fallback: bool
    hinted: bool  # the client gave an urgency or a task type: presets apply
