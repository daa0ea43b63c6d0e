"""RULES: what each engine needs changed in a request, or must never see. Found by running them. Pure.

A rule looks at a body and returns it, the same object where there is nothing to do. A body that no rule changes goes
out as the client's own bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import orjson

from xgen_proxy.dialects import request_rewrites as do
from xgen_proxy.dialects.dialect import BackendRequest, Dialect, Json

Action = Literal["rename", "fill", "drop", "translate", "refuse"]


@dataclass(frozen=True, slots=True)
class Rule:
    """`hazard`: what the engine does when the rule is not applied."""

    name: str
    dialects: tuple[str, ...]
    action: Action
    hazard: str
    apply: Callable[[Json, BackendRequest], Json]


def prepare(dialect: Dialect, request: BackendRequest) -> bytes:
    """The bytes for this backend. Raises BadRequestError, saying what to change."""
    body = prepared(dialect, request)
    if body is request.body and request.raw is not None:
        return request.raw
    return orjson.dumps(body)


def prepared(dialect: Dialect, request: BackendRequest) -> Json:
    body = request.body
    for rule in BY_DIALECT[dialect.name]:
        body = rule.apply(body, request)
    return body


VLLM = ("vllm",)
NATIVE = ("llama-server",)
PYTHON = ("llama-cpp-python",)
CPP = (*NATIVE, *PYTHON)

RULES: tuple[Rule, ...] = (
    Rule("model name", (*VLLM, *CPP, "openai"), "rename", "vLLM answers 404 to a public alias", do.name_model),
    Rule("guided_json, guided_choice, …", VLLM, "translate", "ignored: the output is not constrained",
         do.guided_to_structured),
    Rule("functions, function_call", (*VLLM, *NATIVE), "refuse", "ignored: the model never calls one",
         do.no_functions),
    Rule("max_completion_tokens on /v1/completions", (*VLLM, *NATIVE), "rename", "a chat's field: ignored",
         do.name_legacy_max_tokens),
    Rule("repeat_penalty", VLLM, "rename", "llama.cpp's name: ignored",
         do.rename("repeat_penalty", "repetition_penalty")),
    Rule("repetition_penalty", CPP, "rename", "vLLM's name: ignored",
         do.rename("repetition_penalty", "repeat_penalty")),
    Rule("null fields", PYTHON, "drop", "500, a validation error", do.drop_nulls),
    Rule("max_completion_tokens", PYTHON, "rename", "ignored: generates to the end of the context, holding the lock",
         do.name_max_tokens),
    Rule("no max_tokens on /v1/completions", CPP, "fill", "llama-server generates to the end of the context",
         do.limit_legacy_completion),
    Rule("grammar", PYTHON, "refuse", "one that llama.cpp cannot parse kills the process",
         do.refuse("grammar", "one that it cannot parse would kill it; use response_format")),
    Rule("suffix", PYTHON, "refuse", "the wrong tokens around it", do.refuse("suffix", "it would be misread")),
    Rule("structured_outputs", PYTHON, "refuse", "ignored",
         do.refuse("structured_outputs", "it is vLLM's; use response_format")),
    Rule("n, best_of", PYTHON, "refuse", "ignored: one choice", do.one_choice),
    Rule("several prompts, token ids", PYTHON, "refuse", "500", do.one_prompt),
    Rule("developer role, content parts, null content", PYTHON, "translate", "500", do.plain_messages),
    Rule("tools with tool_choice none", PYTHON, "drop", "some templates show them to the model all the same",
         do.no_unforced_tools),
    Rule("json_schema, schemas", PYTHON, "translate",
         "500; and a schema that converts to a broken grammar kills the process", do.json_object_with_schema),
    Rule("functions and their schemas", PYTHON, "translate",
         "500 without parameters; a schema that converts to a broken grammar kills the process", do.known_functions),
    Rule("logprobs without top_logprobs", PYTHON, "fill", "no logprobs", do.logprobs_of_the_token),
    Rule("negative top_k", PYTHON, "translate", "500; vLLM takes -1 for all", do.all_top_k),
    Rule("no repeat_penalty", PYTHON, "fill", "1.1 by default: answers unlike those of every other engine",
         do.no_repeat_penalty),
    Rule("stop", PYTHON, "drop", "its tokens are never sent, so that usage cannot be counted: dialects/llama_cpp_python/stop_strings.py cuts",
         do.strings_to_stop),
    Rule("response_format on /v1/completions", NATIVE, "translate", "ignored", do.schema_of_completion),
    Rule("repeat_last_n, dry_penalty_last_n, n_probs", NATIVE, "refuse", "a repeat_last_n of 10^9 took it 19 s",
         do.bounded_sizes),
    Rule("wide enums", NATIVE, "refuse", "one of 2,000 values holds it up for everybody, for 25 s", do.narrow_schemas),
    Rule("stream: false", NATIVE, "fill", "a client that leaves does not stop the generation", do.stream_here),
    Rule("usage", NATIVE, "fill", "a stream has no usage unless asked", do.always_usage),
    Rule("stream: false, logprobs, echo", PYTHON, "fill",
         "a client that leaves does not stop the generation; a stream with logprobs loses characters, one with echo"
         " has none", do.stream_where_right),
    Rule("types and ranges", PYTHON, "refuse", "500, or in a stream 200 and an empty body", do.known_fields),
)  # fmt: skip

BY_DIALECT: dict[str, tuple[Rule, ...]] = {
    name: tuple(rule for rule in RULES if name in rule.dialects) for name in (*VLLM, *CPP, "openai")
}
