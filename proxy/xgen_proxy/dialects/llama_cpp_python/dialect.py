"""llama-cpp-python's server: https://llama-cpp-python.readthedocs.io/en/latest/server/"""

from __future__ import annotations

import base64
import struct
from dataclasses import replace

import orjson

from xgen_proxy.dialects import request_rules as shared
from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.error_mapping import read_error
from xgen_proxy.dialects.llama_cpp_python import request_rewrites as rewrite
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.llama_cpp_python.request_models import checked_fields
from xgen_proxy.dialects.llama_cpp_python.stream import LlamaCppPythonCollector, LlamaCppPythonEditor
from xgen_proxy.dialects.llama_cpp_python.token_usage import TokenCounter, count_tokens
from xgen_proxy.dialects.request_rules import Rule
from xgen_proxy.errors import (
    BadRequestError,
    MissingCapabilityError,
    ProxyError,
    RequestRejectedError,
    UpstreamError,
    UpstreamProtocolError,
)
from xgen_proxy.request.features import Features, Json

CHAT_ONLY = ("messages", "max_completion_tokens", "chat_template_kwargs")
UNLIMITED = 2**20  # tokens; generation stops at the end of the context anyway


def asks_for_stream(request: BackendRequest) -> bool:
    """A stream with logprobs loses characters, and one with echo has none; both are asked for whole, which the engine
    does not cancel."""
    if request.features.endpoint == "embeddings":
        return False
    return not request.features.needs & {"logprobs", "echo"}


def stream_where_right(body: Json, request: BackendRequest) -> Json:
    return body if request.features.endpoint == "embeddings" else {**body, "stream": asks_for_stream(request)}


def drop_stop_strings(body: Json, request: BackendRequest) -> Json:
    stop = body.get("stop")
    if isinstance(stop, list) and not all(isinstance(each, str) for each in stop):
        raise BadRequestError("stop must be a string or an array of strings", param="stop")
    if stop is None or not asks_for_stream(request):
        return body
    return {key: value for key, value in body.items() if key != "stop"}


def check_fields(body: Json, request: BackendRequest) -> Json:
    return checked_fields(request.features.endpoint, body)


RULES = (
    shared.MODEL_NAME,
    shared.REPETITION_PENALTY,
    Rule("null fields", "drop", "500, a validation error", rewrite.drop_nulls),
    Rule(
        "max_completion_tokens",
        "rename",
        "ignored: generates to the end of the context, holding the lock",
        shared.rename_max_completion_tokens,
    ),
    shared.LEGACY_COMPLETION_LIMIT,
    Rule(
        "grammar",
        "refuse",
        "one that llama.cpp cannot parse kills the process",
        shared.refuse("grammar", "one that it cannot parse would kill it; use response_format"),
    ),
    Rule("suffix", "refuse", "the wrong tokens around it", shared.refuse("suffix", "it would be misread")),
    Rule(
        "structured_outputs",
        "refuse",
        "ignored",
        shared.refuse("structured_outputs", "it is vLLM's; use response_format"),
    ),
    Rule(
        "continue_final_message",
        "refuse",
        "ignored: the answer begins anew after the client's own words",
        shared.refuse("continue_final_message", "it begins a new message"),
    ),
    Rule("n, best_of", "refuse", "ignored: one choice", rewrite.one_choice),
    Rule("several prompts, token ids", "refuse", "500", rewrite.one_prompt),
    Rule("developer role, content parts, null content", "translate", "500", rewrite.plain_messages),
    Rule(
        "tools with tool_choice none",
        "drop",
        "some templates show them to the model all the same",
        rewrite.drop_unforced_tools,
    ),
    Rule(
        "json_schema, schemas",
        "translate",
        "500; and a schema that converts to a broken grammar kills the process",
        rewrite.json_object_with_schema,
    ),
    Rule(
        "functions and their schemas",
        "translate",
        "500 without parameters; a schema that converts to a broken grammar kills the process",
        rewrite.checked_functions,
    ),
    Rule("logprobs without top_logprobs", "fill", "no logprobs", rewrite.fill_top_logprobs),
    Rule("negative top_k", "translate", "500; vLLM takes -1 for all", rewrite.positive_top_k),
    Rule(
        "no repeat_penalty",
        "fill",
        "1.1 by default: answers unlike those of every other engine",
        rewrite.fill_repeat_penalty,
    ),
    Rule(
        "stop",
        "drop",
        "its tokens are never sent, so that usage could not be counted; the proxy cuts at stop strings instead",
        drop_stop_strings,
    ),
    Rule(
        "stream: false, logprobs, echo",
        "fill",
        "a client that disconnects does not stop the generation; a stream with logprobs loses characters, one with echo"
        " has none",
        stream_where_right,
    ),
    Rule("types and ranges", "refuse", "500, or in a stream 200 and an empty body", check_fields),
)


def input_of_prompt(body: Json, request: BackendRequest) -> Json:
    """Its own name for the text. It adds the special tokens of its model to any text, and renders no chat there."""
    if request.features.endpoint != "tokenize":
        return body
    text = body.get("prompt", body.get("content"))
    if not isinstance(text, str) or body.get("add_special_tokens", body.get("add_special")) is False:
        message = "llama-cpp-python takes a prompt, one text, and adds special tokens to it"
        raise MissingCapabilityError("tokenize for messages, or without special tokens", message)
    return {"model": body.get("model"), "input": text}


def _as_vllm_tokenizes(request: BackendRequest, data: bytes) -> bytes:
    """Raises UpstreamProtocolError."""
    try:
        answer = orjson.loads(data)
        if request.features.endpoint == "detokenize":
            return orjson.dumps({"prompt": answer["text"]})
        tokens = answer["tokens"]
        return orjson.dumps({"count": len(tokens), "max_model_len": request.context, "tokens": tokens})
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise UpstreamProtocolError("the response has no tokens") from None


class LlamaCppPython(Dialect):
    """One request at a time; cancels only streams; reports no usage in them."""

    name = "llama-cpp-python"
    device_class = "cpu"
    capabilities = frozenset(
        {"generation", "forced_tool", "logprobs", "json_object", "json_schema", "echo", "tokenize"}
    )
    why_no_images = "the proxy sends llama-cpp-python text only; use llama-server with --mmproj for images"
    why_no_embeddings = "llama-cpp-python gives a vector for each token; use llama-server for embeddings"
    slots = 1  # one global lock
    health_path = "/health"  # a 404 that needs no lock; it has no health route, and /openapi.json has 40 KB
    models_change = False  # and /v1/models waits for its lock
    uses_canary = True
    separates_reasoning = False  # it sends all that the model writes as text
    sends_request_id = False  # it answers 400 to an X-Request-Id that is not a UUID
    rules = RULES
    opaque_rules = (
        *Dialect.opaque_rules,
        Rule("prompt on /tokenize", "rename", "vLLM's name: 422", input_of_prompt),
    )

    def path(self, request: BackendRequest) -> str:
        return f"/extras{request.path}" if request.opaque else request.path

    def asks_for_stream(self, request: BackendRequest) -> bool:
        """If possible, since it cancels only streams."""
        return asks_for_stream(request)

    def stream_editor(self, request: BackendRequest) -> LlamaCppPythonEditor:
        return LlamaCppPythonEditor(request, TokenCounter(request, self.prepared))

    def stream_collector(self, request: BackendRequest) -> LlamaCppPythonCollector:
        return LlamaCppPythonCollector(request, TokenCounter(request, self.prepared))

    def repair_whole(self, request: BackendRequest, data: bytes) -> bytes:
        data = super().repair_whole(request, data)
        if request.opaque:
            return _as_vllm_tokenizes(request, data)
        return _flat_embeddings(request, data) if request.features.endpoint == "embeddings" else data

    async def explain_empty_stream(self, request: BackendRequest, post: Post) -> ProxyError | UpstreamError:
        """An empty stream is its way to say that the prompt is too long. Asked for a whole response, it says so."""
        status, answer = await post(request.path, {**self.prepared(request), "stream": False, "max_tokens": 1})
        if status != 200:
            return read_error(status, orjson.dumps(answer))
        return await super().explain_empty_stream(request, post)

    def can_resume(self, features: Features, template: ChatTemplate | None) -> bool:
        """Not within a chat with tools: they have no place in the completion that continues it."""
        with_tools = not features.needs.isdisjoint(("tools", "forced_tool"))
        return features.endpoint == "completions" or (template is not None and not with_tools)

    def resume_chat(self, request: BackendRequest, prefix: str, template: ChatTemplate | None) -> BackendRequest:
        """A completion, since a chat would begin a new message: its prompt is the rendered template and the prefix."""
        if template is None:
            raise UpstreamProtocolError("no chat_template is set, which llama-cpp-python needs to resume a chat")
        body = request.body
        kept = {name: value for name, value in body.items() if name not in CHAT_ONLY}
        prompt = template.render(rewrite.plain_messages(body, request)["messages"]) + prefix
        limit = body.get("max_tokens") or request.context or UNLIMITED
        features = replace(request.features, endpoint="completions", max_tokens=limit)
        return replace(request, features=features, body={**kept, "prompt": prompt, "max_tokens": limit})

    async def count_tokens(self, request: BackendRequest, text: str, post: Post) -> int:
        return await count_tokens(text, post) - await count_tokens("", post)

    async def token_ids(self, model: str, text: str, post: Post) -> list[int] | None:
        """It puts the special tokens of its model before any text."""
        path = "/extras/tokenize"
        tokens, special = [await self.tokenize({"model": model, "input": each}, post, path) for each in (text, "")]
        return tokens[len(special) :] if tokens is not None and special is not None else None


def _flat_embeddings(request: BackendRequest, data: bytes) -> bytes:
    """Rejects a vector for each token, which a model without pooling gives. Encodes base64, which the engine cannot."""
    try:
        answer = orjson.loads(data)
        vectors = [item["embedding"] for item in answer["data"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise UpstreamProtocolError("the response is not a list of embeddings") from None
    if any(vector and isinstance(vector[0], list) for vector in vectors):
        raise RequestRejectedError(
            "this model has a vector for each token, none for the text: it is not made for embeddings"
        )
    if request.body.get("encoding_format") != "base64":
        return data
    for item in answer["data"]:
        vector = item["embedding"]
        item["embedding"] = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return orjson.dumps(answer)
