"""Rules: what an engine needs changed in a request, or must never see. Each was found by running the engine.

A rewrite takes a body and returns it; if there is nothing to change, the same object. The rules and rewrites that
several engines share are here; the others are in their engine's module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Json
from xgen_proxy.values import frozen

Action = Literal["rename", "fill", "drop", "translate", "limit", "refuse"]
Rewrite = Callable[[Json, BackendRequest], Json]

LIMITS = ("max_tokens", "max_completion_tokens")
TEMPLATE_TOKENS = 64  # what a chat template adds; SmolLM2's default system prompt has 36
LEGACY_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens on /v1/completions


@frozen
class Rule:
    """`hazard`: what the engine does if the rule is not applied.

    A body that no rule changes is sent as the client's own bytes. `apply` raises BadRequestError if the engine cannot
    serve the request.
    """

    name: str
    action: Action
    hazard: str
    apply: Rewrite


def name_model(body: Json, request: BackendRequest) -> Json:
    return body if body.get("model") == request.served else {**body, "model": request.served}


def rename(old: str, new: str) -> Rewrite:
    """Renames a field; if both are given, the new name wins."""

    def rewrite(body: Json, _: BackendRequest) -> Json:
        if body.get(old) is None:
            return body
        body = dict(body)
        value = body.pop(old)
        return body if body.get(new) is not None else {**body, new: value}

    return rewrite


def refuse(field: str, reason: str) -> Rewrite:
    def rewrite(body: Json, _: BackendRequest) -> Json:
        if body.get(field):
            raise BadRequestError(f"this backend cannot do {field}: {reason}", param=field)
        return body

    return rewrite


def rename_max_completion_tokens(body: Json, _: BackendRequest) -> Json:
    """max_completion_tokens replaced max_tokens and wins."""
    if body.get("max_completion_tokens") is None:
        return body
    body = dict(body)
    body["max_tokens"] = body.pop("max_completion_tokens")
    return body


def rename_legacy_max_completion_tokens(body: Json, request: BackendRequest) -> Json:
    return rename_max_completion_tokens(body, request) if request.features.endpoint == "completions" else body


def limit_legacy_completion(body: Json, request: BackendRequest) -> Json:
    if request.features.endpoint != "completions" or request.features.max_tokens is not None:
        return body
    return {**body, "max_tokens": LEGACY_COMPLETION_TOKENS}


def clamp_max_tokens(body: Json, request: BackendRequest) -> Json:
    """To what the prompt leaves of the context by estimate, because vLLM 0.26 refuses one token more than fits.

    One that is believed and does not exceed the context itself is left to the engine.
    """
    context, features = request.context, request.features
    limit = features.max_tokens or 0
    if context is None or (limit <= context and features.max_tokens_believed):
        return body
    room = room_beside(features.prompt_tokens, context)
    room = room if room > 0 else context
    if limit <= room:
        return body
    return {**body, **{field: room for field in LIMITS if (body.get(field) or 0) > room}}


def room_beside(prompt_tokens: int, context: int) -> int:
    """The tokens that fit into the context beside a prompt of so many by estimate, or less than 1.

    A short prompt may have half as many tokens again. Beside a long one that would leave nothing, although its estimate
    is nearer the truth, being a sum; a quarter of the rest is kept free instead.
    """
    return max(context - prompt_tokens * 3 // 2, (context - prompt_tokens) * 3 // 4) - TEMPLATE_TOKENS


def drop(*fields: str) -> Rewrite:
    names = frozenset(fields)

    def rewrite(body: Json, _: BackendRequest) -> Json:
        return body if names.isdisjoint(body) else {key: value for key, value in body.items() if key not in names}

    return rewrite


def refuse_functions(body: Json, _: BackendRequest) -> Json:
    if body.get("functions") and body.get("function_call") != "none":
        raise BadRequestError("this backend ignores functions: use tools and tool_choice", param="functions")
    return body


MODEL_NAME = Rule("model name", "rename", "vLLM answers 404 to a public alias", name_model)
NO_FUNCTIONS = Rule("functions, function_call", "refuse", "ignored: the model never calls one", refuse_functions)
# Fields that schedule a request, identify it or move its data between servers. They act on everybody's requests. The
# last two set how large the engine makes an image, and how many frames it takes of a video, after these were checked.
VLLM_INTERNALS = (
    "priority", "request_id", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "data_parallel_rank",
    "mm_processor_kwargs", "media_io_kwargs",
)  # fmt: skip
LLAMA_SERVER_INTERNALS = (
    "id_slot", "slot_id", "grammar_lazy", "grammar_triggers", "preserved_tokens", "chat_format", "chat_parser",
    "generation_prompt", "parse_tool_calls", "sse_ping_interval",
)  # fmt: skip
OTHER_INTERNALS = (
    "rid", "session_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "disaggregated_params",
)  # fmt: skip
# The fields that a form keeps. llama-server copies every text field into a chat request, also grammars and schemas,
# whose size is checked only in JSON bodies. vLLM's beam search is not listed, because its width has no limit.
# https://platform.openai.com/docs/api-reference/audio/createTranscription, vllm/entrypoints/speech_to_text
FORM_FIELDS = frozenset({
    b"file", b"model", b"language", b"languages[]", b"prompt", b"keywords[]", b"response_format", b"temperature",
    b"timestamp_granularities[]", b"include[]", b"stream", b"chunking_strategy", b"chunking_strategy[type]",
    b"chunking_strategy[prefix_padding_ms]", b"chunking_strategy[silence_duration_ms]", b"chunking_strategy[threshold]",
    b"known_speaker_names[]", b"known_speaker_references[]",
    b"hotwords", b"to_language", b"top_p", b"top_k", b"min_p", b"seed", b"frequency_penalty", b"presence_penalty",
    b"repetition_penalty", b"max_completion_tokens", b"stream_include_usage", b"stream_continuous_usage_stats",
})  # fmt: skip
INTERNALS = Rule(
    "every engine's scheduling, identity and transfer fields",
    "drop",
    "the server behind may be any engine",
    drop(*VLLM_INTERNALS, *LLAMA_SERVER_INTERNALS, *OTHER_INTERNALS),
)
LEGACY_MAX_COMPLETION_TOKENS = Rule(
    "max_completion_tokens on /v1/completions",
    "rename",
    "a chat's field: ignored",
    rename_legacy_max_completion_tokens,
)
REPETITION_PENALTY = Rule(
    "repetition_penalty", "rename", "vLLM's name: ignored", rename("repetition_penalty", "repeat_penalty")
)
MAX_TOKENS_BEYOND_CONTEXT = Rule(
    "max_tokens beyond the context", "limit", "400, which agents take for a long prompt", clamp_max_tokens
)
LEGACY_COMPLETION_LIMIT = Rule(
    "no max_tokens on /v1/completions",
    "fill",
    "llama-server generates to the end of the context",
    limit_legacy_completion,
)
