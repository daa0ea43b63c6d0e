"""vLLM: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/"""

from __future__ import annotations

from types import MappingProxyType

from xgen_proxy.dialects import request_rules as shared
from xgen_proxy.dialects.backend_request import Ask, BackendRequest, Post
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.request_rules import Rule
from xgen_proxy.request.features import NEEDS, Features, Json, Need
from xgen_proxy.request.opaque.endpoints import OPAQUE

GENERATES = frozenset({"/v1/chat/completions", "/v1/completions"})
GUIDED = {"guided_json": "json", "guided_choice": "choice", "guided_regex": "regex", "guided_grammar": "grammar"}


def guided_to_structured(body: Json, _: BackendRequest) -> Json:
    """Older versions had a field for each kind of constraint."""
    if GUIDED.keys().isdisjoint(body):  # as in nearly all requests
        return body
    guided = {key: body[key] for key in GUIDED if body.get(key) is not None}
    if not guided:
        return body
    kept = {key: value for key, value in body.items() if key not in GUIDED}
    own = body.get("structured_outputs")
    renamed = {GUIDED[name]: value for name, value in guided.items()}
    return {**kept, "structured_outputs": {**(own if isinstance(own, dict) else {}), **renamed}}


def schema_of_json_object(body: Json, _: BackendRequest) -> Json:
    """The spelling of llama.cpp, Together and others."""
    response_format = body.get("response_format")
    if not response_format or response_format.get("type") != "json_object" or response_format.get("schema") is None:
        return body
    wrapper = {"name": "schema", "schema": response_format["schema"]}
    return {**body, "response_format": {"type": "json_schema", "json_schema": wrapper}}


def prompt_of_content(body: Json, request: BackendRequest) -> Json:
    """llama-server's names, with its default: a text without special tokens."""
    if request.features.endpoint != "tokenize" or "prompt" in body or not isinstance(body.get("content"), str):
        return body
    kept = {name: value for name, value in body.items() if name not in ("content", "add_special")}
    return {**kept, "prompt": body["content"], "add_special_tokens": bool(body.get("add_special"))}


class VLLM(Dialect):
    """Cancels whole responses too, so that they pass unparsed."""

    name = "vllm"
    capabilities = NEEDS - {"grammar", "embeddings"}
    slots = 256  # vLLM's own default of --max-num-seqs
    overcommit = 16
    health_path = "/metrics"
    metrics_path = "/metrics"
    swaps_models = False
    uses_canary = True
    hides_hangs = True
    relief_paths = MappingProxyType({"reset_prefix_cache": "/reset_prefix_cache"})
    rules = (
        shared.MODEL_NAME,
        Rule(
            "guided_json, guided_choice, …",
            "translate",
            "ignored: the output is not constrained",
            guided_to_structured,
        ),
        Rule(
            "response_format json_object with a schema",
            "translate",
            "the schema is ignored: any JSON comes back",
            schema_of_json_object,
        ),
        Rule(
            "priority, request_id, kv_transfer_params, …",
            "drop",
            "one client overtakes all others; an id in use twice breaks both requests",
            shared.drop(*shared.VLLM_INTERNALS),
        ),
        shared.MAX_TOKENS_BEYOND_CONTEXT,
        shared.NO_FUNCTIONS,
        shared.LEGACY_MAX_COMPLETION_TOKENS,
        Rule(
            "repeat_penalty",
            "rename",
            "llama.cpp's name: ignored",
            shared.rename("repeat_penalty", "repetition_penalty"),
        ),
    )

    opaque_rules = (
        *Dialect.opaque_rules,
        Rule("content on /tokenize", "rename", "llama-server's name: 400", prompt_of_content),
    )

    async def missing_routes(self, ask: Ask) -> frozenset[Need]:
        """It has only the routes that its model can serve. A GET for one of them is a 405, for any other a 404.

        /openapi.json lists them too, but to make the list kept the API process of vLLM 0.32 busy for 8 s on two loaded
        cores.
        """
        statuses = {path: (await ask(path, None))[0] for path in {each.path for each in OPAQUE.values()} | GENERATES}
        missing: set[Need] = {each.need for each in OPAQUE.values() if statuses[each.path] == 404}
        return frozenset(missing | {"generation"} if {statuses[path] for path in GENERATES} == {404} else missing)

    def can_resume(self, features: Features, template: ChatTemplate | None) -> bool:
        return True

    async def count_tokens(self, request: BackendRequest, text: str, post: Post) -> int | None:
        tokens = await self.token_ids(request.served, text, post)
        return None if tokens is None else len(tokens)

    async def token_ids(self, model: str, text: str, post: Post) -> list[int] | None:
        return await self.tokenize({"model": model, "prompt": text, "add_special_tokens": False}, post)
