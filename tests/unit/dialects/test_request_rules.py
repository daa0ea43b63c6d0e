"""Each rule of each dialect, by example."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import orjson
import pytest

from tests.support.chunks import make_request
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.errors import BadRequestError

V, S, P, A = "vllm", "llama-server", "llama-cpp-python", "openai"
F: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": F}]
G, H = ({"type": "function", "function": {"name": name}} for name in "gh")
USE_F = {"type": "function", "function": {"name": "f"}}
INTEGER = {"type": "integer"}
AS_INTEGER = {"type": "json_schema", "json_schema": {"name": "n", "schema": INTEGER}}

# (rule, dialect, endpoint, what the client sends, what is changed of it: None is gone; "refused" is a 400)
CASES: list[tuple[str, str, Any, dict[str, Any], dict[str, Any] | str]] = [
    ("guided_json, guided_choice, …", V, "chat", {"guided_choice": ["a"]},
     {"guided_choice": None, "structured_outputs": {"choice": ["a"]}}),
    ("guided_json, guided_choice, …", V, "chat", {"guided_json": INTEGER, "structured_outputs": {"whitespace": 1}},
     {"guided_json": None, "structured_outputs": {"whitespace": 1, "json": INTEGER}}),
    ("priority, request_id, kv_transfer_params, …", V, "chat",
     {"priority": -(2**31), "request_id": "a", "kv_transfer_params": {}, "vllm_xargs": {}, "cache_salt": "a"},
     {"priority": None, "request_id": None, "kv_transfer_params": None, "vllm_xargs": None}),
    ("priority, request_id, kv_transfer_params, …", V, "embeddings", {"priority": 1}, {"priority": None}),
    ("id_slot, grammar_triggers, …", S, "chat", {"id_slot": 0, "grammar_triggers": [], "cache_prompt": False},
     {"id_slot": None, "grammar_triggers": None}),
    ("every engine's scheduling, identity and transfer fields", A, "chat",
     {"priority": 1, "rid": "a", "id_slot": 0, "bootstrap_host": "b", "service_tier": "auto"},
     {"priority": None, "rid": None, "id_slot": None, "bootstrap_host": None}),
    ("response_format json_object with a schema", V, "chat",
     {"response_format": {"type": "json_object", "schema": INTEGER}},
     {"response_format": {"type": "json_schema", "json_schema": {"name": "schema", "schema": INTEGER}}}),
    ("response_format json_object with a schema", V, "chat", {"response_format": {"type": "json_object"}}, {}),
    ("max_tokens beyond the context", V, "chat", {"max_tokens": 32_000}, {}),  # the context is unknown
    ("max_tokens beyond the context", A, "chat", {"max_tokens": 32_000}, {}),
    ("tool_choice that names functions", S, "chat", {"tools": [*TOOLS, G], "tool_choice": USE_F},
     {"tools": TOOLS, "tool_choice": "required"}),
    ("tool_choice that names functions", S, "chat", {"tools": [*TOOLS, G, H], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [USE_F, H]}}},
     {"tools": [*TOOLS, H], "tool_choice": "auto"}),
    ("tool_choice that names functions", S, "chat", {"tools": [G], "tool_choice": USE_F}, "refused"),
    ("tool_choice that names functions", S, "chat", {"tools": [{}], "tool_choice": {}}, "refused"),
    ("tool_choice that names functions", S, "chat", {"tools": TOOLS, "tool_choice": "required"}, {}),
    ("audio_url, and refusals in the history", S, "chat",
     {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}]},
     {"messages": [{"role": "user", "content": [{"type": "text", "text": "No."}]}]}),
    ("functions, function_call", V, "chat", {"functions": [F]}, "refused"),
    ("functions, function_call", S, "chat", {"functions": [F], "function_call": {"name": "f"}}, "refused"),
    ("functions, function_call", S, "chat", {"functions": [F], "function_call": "none"}, {}),
    ("max_completion_tokens on /v1/completions", V, "completions", {"max_completion_tokens": 3},
     {"max_completion_tokens": None, "max_tokens": 3}),
    ("max_completion_tokens on /v1/completions", S, "completions", {"max_completion_tokens": 3, "max_tokens": 9},
     {"max_completion_tokens": None, "max_tokens": 3}),
    ("max_completion_tokens on /v1/completions", V, "chat", {"max_completion_tokens": 3}, {}),
    ("repeat_penalty", V, "chat", {"repeat_penalty": 1.2}, {"repeat_penalty": None, "repetition_penalty": 1.2}),
    ("repetition_penalty", S, "chat", {"repetition_penalty": 1.2}, {"repetition_penalty": None, "repeat_penalty": 1.2}),
    ("repetition_penalty", P, "chat", {"repetition_penalty": 1.2, "repeat_penalty": 1.3},
     {"repetition_penalty": None, "repeat_penalty": 1.3}),
    ("null fields", P, "chat", {"temperature": None, "n": None}, {"temperature": None, "n": None}),
    ("max_completion_tokens", P, "chat", {"max_completion_tokens": 3, "max_tokens": 9},
     {"max_completion_tokens": None, "max_tokens": 3}),
    ("no max_tokens on /v1/completions", S, "completions", {}, {"max_tokens": 16}),
    ("no max_tokens on /v1/completions", P, "completions", {"max_tokens": 5}, {"max_tokens": 5}),
    ("no max_tokens on /v1/completions", S, "chat", {}, {}),
    ("grammar", P, "chat", {"grammar": 'root ::= "a"'}, "refused"),
    ("grammar", S, "chat", {"grammar": 'root ::= "a"'}, {}),
    ("suffix", P, "completions", {"suffix": "b"}, "refused"),
    ("continue_final_message", P, "chat", {"continue_final_message": True}, "refused"),
    ("structured_outputs", P, "chat", {"structured_outputs": {"choice": ["a"]}}, "refused"),
    ("n, best_of", P, "chat", {"n": 2}, "refused"),
    ("n, best_of", P, "completions", {"best_of": 2}, "refused"),
    ("n, best_of", P, "chat", {"n": 1}, {"n": None}),
    ("several prompts, token ids", P, "completions", {"prompt": ["a", "b"]}, "refused"),
    ("several prompts, token ids", P, "completions", {"prompt": [1, 2]}, "refused"),
    ("several prompts, token ids", P, "completions", {"prompt": ["a"]}, {"prompt": "a"}),
    ("developer role, content parts, null content", P, "chat",
     {"messages": [{"role": "developer",
                    "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
                   {"role": "assistant", "content": None, "name": None}]},
     {"messages": [{"role": "system", "content": "a\nb"}, {"role": "assistant", "content": ""}]}),
    ("tools with tool_choice none", P, "chat", {"tools": TOOLS, "tool_choice": "none"},
     {"tools": None, "tool_choice": None}),
    ("json_schema, schemas", P, "chat", {"response_format": AS_INTEGER},
     {"response_format": {"type": "json_object", "schema": INTEGER}}),
    ("json_schema, schemas", P, "chat", {"response_format": {"type": "json_object"}}, {}),
    ("json_schema, schemas", P, "chat", {"response_format": {"type": "json_object", "schema": {"pattern": "a"}}},
     "refused"),
    ("json_schema, schemas", P, "completions", {"response_format": {"type": "json_object"}}, "refused"),
    ("functions and their schemas", P, "chat",
     {"tools": [{"type": "function", "function": {"name": "f", "description": None}}], "tool_choice": USE_F},
     {"tools": [{"type": "function", "function": {
         "name": "f", "parameters": {"type": "object", "additionalProperties": False}}}]}),
    ("functions and their schemas", P, "chat", {"functions": [F], "function_call": {"name": "f"}}, {}),
    ("functions and their schemas", P, "chat", {"tools": [5], "tool_choice": USE_F}, "refused"),
    ("functions and their schemas", P, "chat", {"tools": [{"type": "function"}], "tool_choice": USE_F}, "refused"),
    ("functions and their schemas", P, "chat", {"functions": "f", "function_call": {"name": "f"}}, "refused"),
    ("functions and their schemas", P, "chat",
     {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "refused"),
    ("logprobs without top_logprobs", P, "chat", {"logprobs": True}, {"top_logprobs": 0, "stream": False}),
    ("negative top_k", P, "chat", {"top_k": -1}, {"top_k": 0}),
    ("no repeat_penalty", P, "chat", {}, {"repeat_penalty": 1.0}),
    ("stop", P, "chat", {"stop": ["a"]}, {"stop": None}),
    ("stop", P, "chat", {"stop": ["a"], "logprobs": True}, {"stop": ["a"], "top_logprobs": 0, "stream": False}),
    ("stop", P, "chat", {"stop": [5]}, "refused"),
    ("response_format on /v1/completions", S, "completions", {"response_format": AS_INTEGER, "max_tokens": 1},
     {"response_format": None, "json_schema": INTEGER}),
    ("response_format on /v1/completions", S, "completions",
     {"response_format": {"type": "json_object"}, "max_tokens": 1},
     {"response_format": None, "json_schema": {"type": "object"}}),
    ("response_format on /v1/completions", S, "chat", {"response_format": AS_INTEGER}, {}),
    ("repeat_last_n, dry_penalty_last_n, n_probs", S, "chat", {"repeat_last_n": 10**9}, "refused"),
    ("repeat_last_n, dry_penalty_last_n, n_probs", S, "chat", {"n_probs": "many"}, "refused"),
    ("repeat_last_n, dry_penalty_last_n, n_probs", S, "chat", {"n_probs": 5}, {}),
    ("wide enums", S, "chat", {"json_schema": {"anyOf": [{"enum": list(range(251))}]}}, "refused"),
    ("wide enums", S, "chat", {"json_schema": {"enum": list(range(250)), "title": ["x"] * 251}}, {}),
    ("stream: false", S, "chat", {}, {"stream": True}),
    ("usage", S, "chat", {}, {"stream_options": {"include_usage": True}}),
    ("usage", S, "chat", {"stream": True}, {}),
    ("stream: false, logprobs, echo", P, "chat", {}, {"stream": True}),
    ("stream: false, logprobs, echo", P, "completions", {"echo": True, "stream": True, "max_tokens": 1},
     {"stream": False}),
    ("types and ranges", P, "chat", {"min_p": 2}, "refused"),
    ("types and ranges", P, "chat", {"logit_bias": {"a": 1}}, "refused"),
    ("types and ranges", P, "chat", {"messages": [{"role": "tool", "content": "a"}]}, "refused"),
    ("types and ranges", P, "chat", {"messages": [{"role": "function", "content": "a"}]}, "refused"),
    ("types and ranges", P, "completions", {"prompt": ""}, "refused"),
    ("types and ranges", P, "chat", {"store": True, "user": 5}, {"store": None, "user": None}),
]  # fmt: skip

# What is filled in for every request, so that the cases need not tell it.
ALWAYS: dict[str, dict[str, Any]] = {
    V: {},
    S: {"stream": True, "stream_options": {"include_usage": True}},
    P: {"stream": True, "repeat_penalty": 1.0},
    A: {},
}
LENGTH = {"max_tokens": 16}


@pytest.mark.parametrize(("rule", "dialect", "endpoint", "sent", "changed"), CASES, ids=[case[0] for case in CASES])
def test_rules(rule: str, dialect: str, endpoint: Any, sent: dict[str, Any], changed: dict[str, Any] | str) -> None:
    request = make_request(endpoint, **sent)
    before = copy.deepcopy(request.body)
    if isinstance(changed, str):
        with pytest.raises(BadRequestError) as refused:
            DIALECTS[dialect].prepare(request)
        assert refused.value.param
        assert refused.value.status == 400
        return
    always = ALWAYS[dialect] if not sent.get("stream") else {**ALWAYS[dialect], "stream_options": None}
    length = LENGTH if endpoint == "completions" and dialect != V and request.features.max_tokens is None else {}
    expected = {**request.body, **always, **length, **changed}
    expected = {key: value for key, value in expected.items() if value is not None}
    assert orjson.loads(DIALECTS[dialect].prepare(request)) == expected
    assert request.body == before, "the client's own body was changed, which a second attempt needs"


def test_every_rule_has_a_case() -> None:
    rules = {rule.name: rule for dialect in DIALECTS.values() for rule in dialect.rules}
    assert {case[0] for case in CASES} == set(rules) - {"model name"}
    assert all(rule.hazard for rule in rules.values())
    for name, dialect, *_ in CASES:
        assert name in [rule.name for rule in DIALECTS[dialect].rules] or (name, dialect) == ("grammar", S)


def test_a_name_means_one_rule() -> None:
    rules = {rule for dialect in DIALECTS.values() for rule in dialect.rules}
    assert len({rule.name for rule in rules}) == len(rules)


# (tokens of the prompt by estimate, what the client asks for, whether it is believed, the context, what is sent)
LIMITS = [
    (1_000, 32_000, False, 8_192, 8_192 - 1_564),
    (1_000, 32_000, True, 8_192, 8_192 - 1_564),  # more than the context can never be served
    (17_459, 32_000, False, 32_768, 15_309 * 3 // 4 - 64),  # https://github.com/farion1231/cc-switch/issues/1022
    (21_800, 32_000, False, 32_768, 10_968 * 3 // 4 - 64),  # half as many again would fill the context
    (30_000, 32_000, False, 32_768, 2_768 * 3 // 4 - 64),
    (100, 32_000, False, 32_768, 32_000),  # it fits
    (17_459, 16_000, True, 32_768, 16_000),  # the client means it, and the engine may refuse
    (8_150, 32_000, False, 8_192, 8_192),  # nothing fits by estimate: the engine decides
    (8_150, 8_192, False, 8_192, 8_192),
    (1_000, 32_000, False, None, 32_000),
]


@pytest.mark.parametrize("dialect", [V, A])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(("prompt", "limit", "believed", "context", "sent"), LIMITS)
def test_a_limit_that_is_not_meant_is_cut_to_what_fits(
    dialect: str, field: str, prompt: int, limit: int, believed: bool, context: int | None, sent: int
) -> None:
    request = make_request("chat", "m", "m", context, **{field: limit})
    features = replace(request.features, prompt_tokens=prompt, max_tokens_believed=believed)
    prepared = orjson.loads(DIALECTS[dialect].prepare(replace(request, features=features)))
    assert prepared[field] == sent
