"""vLLM: https://docs.vllm.ai/en/latest/serving/openai_compatible_server/"""

from __future__ import annotations

from xgen_proxy.dialects import request_rules as shared
from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.request_rules import Rule
from xgen_proxy.request.features import NEEDS, Features, Json

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


class VLLM(Dialect):
    """Cancels whole responses too, so that they pass unparsed."""

    name = "vllm"
    capabilities = NEEDS - {"grammar", "embeddings"}
    slots = 256  # vLLM's own default of --max-num-seqs
    overcommit = 16
    health_path = "/metrics"
    metrics_path = "/metrics"
    uses_canary = True
    hides_hangs = True
    rules = (
        shared.MODEL_NAME,
        Rule(
            "guided_json, guided_choice, …",
            "translate",
            "ignored: the output is not constrained",
            guided_to_structured,
        ),
        shared.NO_FUNCTIONS,
        shared.LEGACY_MAX_COMPLETION_TOKENS,
        Rule(
            "repeat_penalty",
            "rename",
            "llama.cpp's name: ignored",
            shared.rename("repeat_penalty", "repetition_penalty"),
        ),
    )

    def can_resume(self, features: Features, template: ChatTemplate | None) -> bool:
        return True

    async def count_tokens(self, request: BackendRequest, text: str, post: Post) -> int | None:
        question = {"model": request.served, "prompt": text, "add_special_tokens": False}
        return await self.tokenize(question, post)
