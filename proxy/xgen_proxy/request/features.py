"""Features: what routing needs to know about a request, and the words for it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from xgen_proxy.values import frozen

Endpoint = Literal[
    "chat", "completions", "embeddings",
    "rerank", "score", "classify", "tokenize", "detokenize", "transcriptions", "translations",  # request/opaque
]  # fmt: skip
Urgency = Literal["high", "normal", "low"]
DeviceClass = Literal["gpu", "cpu"]

Need = Literal[
    "generation",  # any text: all but embeddings; an engine may be started for embeddings only
    "embeddings",  # the /v1/embeddings endpoint
    "images",  # any image, audio or file content part
    "tools",  # the model chooses a tool (tool_choice auto, required or absent)
    "forced_tool",  # tool_choice names the function
    "n",  # several choices (n or best_of > 1)
    "logprobs",
    "json_object",
    "json_schema",
    "grammar",  # llama.cpp's fields grammar and json_schema; other engines would leave the output unconstrained
    "structured_outputs",  # vLLM's field, and its response_format of type structural_tag
    "prompt_list",  # several prompts in one /v1/completions
    "token_ids",  # a prompt as token ids
    "echo",
    "suffix",
    "rerank",  # these and the following: an endpoint of the same name, see request/opaque
    "score",
    "classify",
    "tokenize",  # /detokenize too
    "transcriptions",
    "translations",
]
NEEDS = frozenset(get_args(Need))
HINTS = {"backend": b"x-backend", "urgency": b"x-urgency", "task_type": b"x-task-type", "fallback": b"x-fallback",
         "continuation": b"x-continuation", "session_id": b"x-session-id"}  # fmt: skip
PROMPT_FIELD: dict[Endpoint, str] = {"chat": "messages", "completions": "prompt", "embeddings": "input"}

Json = dict[str, Any]


@frozen
class UsedAlias:
    """The alias that a request's model name is. `asked`: the name that the client sent. `pattern`: its entry in
    `models.aliases`. `model`: the public name that it stands for. `route`: the device class that comes first."""

    asked: str
    pattern: str
    model: str
    route: DeviceClass | None = None
    urgency: Urgency | None = None


@frozen
class Features:
    """`model` is a public name, no alias. `prompt_tokens` is an estimate, see estimate_tokens(). `max_tokens` is None
    if the client set none; it is believed unless it is so large that it says nothing about the answer's length."""

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
    continuation: bool  # a broken stream may be resumed on another replica
    hinted: bool  # the client gave an urgency or a task type, so presets apply
    session: str | None  # requests of one session begin alike
    prefix: str  # the beginning of the prompt, up to and including the user's first message
    max_tokens_believed: bool = True
    alias: UsedAlias | None = None
