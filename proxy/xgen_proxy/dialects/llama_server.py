"""llama-server, llama.cpp's own server: https://github.com/ggml-org/llama.cpp/tree/master/tools/server"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from xgen_proxy import sse
from xgen_proxy.dialects import request_rules as shared
from xgen_proxy.dialects.backend_request import Ask, BackendRequest, Post, ReplicaInfo
from xgen_proxy.dialects.dialect import Dialect, continuing, count
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.request_rules import Rule
from xgen_proxy.dialects.stream_editors import StreamEditor, joined_usage, legacy_logprobs, rename_model
from xgen_proxy.errors import BadRequestError, MissingCapabilityError, UpstreamProtocolError
from xgen_proxy.request.features import NEEDS, Features, Json, Need
from xgen_proxy.request.limits import schemas

# Fields of llama.cpp whose size costs memory or time, with their limits: a repeat_last_n of 10^9 took 19 s.
SIZES = {"repeat_last_n": 4096, "dry_penalty_last_n": 4096, "n_probs": 20}
MAX_ENUM = 250  # values in one place of a schema; 500 blocked the server for 3 s, 2,000 for 25 s
ENUM_KEYWORDS = ("enum", "anyOf", "oneOf")
MODALITIES = {"images": "vision", "audio": "audio", "video": "video"}  # what we call it → what /props does
OTHER_PARTS = ("refusal", "audio_url")  # of a message, for which it has a 400
CREATED = re.compile(rb'"created":\d+')  # inside a JSON string the quotes would be escaped


def parts_it_knows(body: Json, request: BackendRequest) -> Json:
    """Refusals of earlier answers become text, and `audio_url` its own `input_audio`. Raises MissingCapabilityError."""
    if request.features.endpoint != "chat" or not any(
        part["type"] in OTHER_PARTS for message in body["messages"] for part in _parts(message)
    ):
        return body
    messages = [
        {**message, "content": [_known_part(part) for part in parts]} if (parts := _parts(message)) else message
        for message in body["messages"]
    ]
    return {**body, "messages": messages}


def _parts(message: Json) -> list[Json]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _known_part(part: Json) -> Json:
    if part["type"] == "refusal":
        return {"type": "text", "text": part["refusal"]}
    if part["type"] != "audio_url":
        return part
    head, is_data, data = part["audio_url"]["url"].partition(";base64,")
    if not is_data:
        raise MissingCapabilityError("remote audio", "llama-server takes audio as data only")
    return {"type": "input_audio", "input_audio": {"data": data, "format": "mp3" if "/mp" in head else "wav"}}


def schema_of_completion(body: Json, request: BackendRequest) -> Json:
    """/v1/completions has a field of llama.cpp's for a schema."""
    response_format = body.get("response_format")
    if request.features.endpoint != "completions" or not response_format or response_format.get("type") == "text":
        return body
    holder = response_format["json_schema"] if response_format.get("type") == "json_schema" else response_format
    kept = {key: value for key, value in body.items() if key != "response_format"}
    return {**kept, "json_schema": holder.get("schema") or {"type": "object"}}


def only_chosen_tools(body: Json, _: BackendRequest) -> Json:
    """Leaves only the tools that the choice names, and says whether one must be called."""
    choice, tools = body.get("tool_choice"), body.get("tools")
    if not isinstance(choice, dict) or not tools:
        return body
    allowed = choice.get("allowed_tools") if choice.get("type") == "allowed_tools" else None
    if isinstance(allowed, dict):
        chosen, mode = allowed.get("tools"), allowed.get("mode", "auto")
    else:
        chosen, mode = [choice], "required"
    names = {_function_name(each) for each in chosen} if isinstance(chosen, list) else set()
    kept = [tool for tool in tools if _function_name(tool) in names]
    if not kept or None in names or mode not in ("auto", "required"):
        raise BadRequestError("tool_choice must name a function that is in tools", param="tool_choice")
    return {**body, "tools": kept, "tool_choice": mode}


def _function_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def limit_sizes(body: Json, _: BackendRequest) -> Json:
    for field in SIZES.keys() & body.keys():
        value = body[field]
        if value is not None and (not isinstance(value, int) or value > SIZES[field]):
            raise BadRequestError(f"{field} must be a whole number up to {SIZES[field]}", param=field)
    return body


def limit_enums(body: Json, _: BackendRequest) -> Json:
    for field, schema in schemas(body):
        if _largest_enum(schema) > MAX_ENUM:
            message = f"this backend takes no schema with more than {MAX_ENUM} values in one enum"
            raise BadRequestError(message, param=field)
    return body


def _largest_enum(schema: Any) -> int:
    largest = 0
    level = [schema]
    while level:
        each = level.pop()
        if isinstance(each, dict):
            lists = [each.get(keyword) for keyword in ENUM_KEYWORDS]
            largest = max(largest, *(len(found) if isinstance(found, list) else 0 for found in lists))
            level.extend(each.values())
        elif isinstance(each, list):
            level.extend(each)
    return largest


def always_stream(body: Json, request: BackendRequest) -> Json:
    return body if request.features.endpoint == "embeddings" else {**body, "stream": True}


def always_usage(body: Json, request: BackendRequest) -> Json:
    """Only for a stream that is collected here; a client's own stream gets what the client asked for."""
    if request.features.endpoint == "embeddings" or request.features.stream:
        return body
    return {**body, "stream_options": {"include_usage": True}}


def content_of_prompt(body: Json, request: BackendRequest) -> Json:
    """vLLM's names, with its default: special tokens are added. It renders no chat there."""
    if request.features.endpoint != "tokenize" or "content" in body:
        return body
    if not isinstance(body.get("prompt"), str):
        raise MissingCapabilityError("tokenize for messages", "llama-server takes a prompt, one text, only")
    special = body.get("add_special_tokens")
    kept = {name: value for name, value in body.items() if name not in ("prompt", "add_special_tokens")}
    return {**kept, "content": body["prompt"], "add_special": special is None or bool(special)}


def _as_vllm_tokenizes(request: BackendRequest, data: bytes) -> bytes:
    """Its answers on /tokenize and /detokenize with vLLM's fields too. Raises UpstreamProtocolError."""
    if request.opaque != "tokenize":
        return data
    try:
        answer = orjson.loads(data)
        if request.features.endpoint == "detokenize":
            return orjson.dumps({**answer, "prompt": answer["content"]})
        return orjson.dumps({**answer, "count": len(answer["tokens"]), "max_model_len": request.context})
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise UpstreamProtocolError("the response has no tokens") from None


class LlamaServer(Dialect):
    """Cancels only streams, so that whole responses are collected from them."""

    name = "llama-server"
    device_class = "cpu"
    capabilities = NEEDS - {
        "structured_outputs", "embeddings", "tools", "forced_tool", "echo", "suffix", "files", *MODALITIES,
        "score", "classify", "transcriptions", "translations",
    }  # fmt: skip
    slots = 4
    overcommit = 0  # it queues without bound
    health_path = "/health"
    health_path_in_use = metrics_path = "/metrics"  # needs --metrics, and wakes a server that sleeps
    info_paths = ("/v1/models", "/props")
    uses_canary = True
    resumes_constrained = frozenset({"json_object", "json_schema"})  # of a chat: its grammar reads the text so far
    reuse_after_stream = False  # it closes the connection after a stream, although it advertises keep-alive
    rules = (
        shared.MODEL_NAME,
        Rule(
            "id_slot, grammar_triggers, …",
            "drop",
            "a client takes the slot, and so the cache, of another",
            shared.drop(*shared.LLAMA_SERVER_INTERNALS),
        ),
        Rule("tool_choice that names functions", "translate", "read as auto: another is called", only_chosen_tools),
        Rule(
            "audio_url, and refusals in the history", "translate", "a 400: parts that it does not know", parts_it_knows
        ),
        shared.NO_FUNCTIONS,
        shared.LEGACY_MAX_COMPLETION_TOKENS,
        shared.REPETITION_PENALTY,
        shared.LEGACY_COMPLETION_LIMIT,
        Rule("response_format on /v1/completions", "translate", "ignored", schema_of_completion),
        Rule(
            "repeat_last_n, dry_penalty_last_n, n_probs",
            "refuse",
            "a repeat_last_n of 10^9 took it 19 s",
            limit_sizes,
        ),
        Rule("wide enums", "refuse", "one of 2,000 values blocks it for all clients, for 25 s", limit_enums),
        Rule("stream: false", "fill", "a client that disconnects does not stop the generation", always_stream),
        Rule("usage", "fill", "a stream has no usage unless asked", always_usage),
    )
    opaque_rules = (
        *Dialect.opaque_rules,
        Rule("prompt on /tokenize", "rename", "vLLM's name: 200 and no tokens", content_of_prompt),
    )

    def parse_info(self, answers: Mapping[str, Any]) -> ReplicaInfo:
        """/props says what the model's template and projector can do."""
        info = super().parse_info(answers)
        props = answers.get("/props")
        if not isinstance(props, dict):
            return info
        capabilities = self.capabilities
        if (props.get("chat_template_caps") or {}).get("supports_tools"):
            capabilities |= {"tools", "forced_tool"}
        modalities = props.get("modalities") or {}
        capabilities |= {need for need, modality in MODALITIES.items() if modalities.get(modality)}
        if modalities.get("audio"):
            capabilities |= {"transcriptions"}
        return replace(info, slots=count(props.get("total_slots")), capabilities=capabilities)

    async def missing_routes(self, ask: Ask) -> frozenset[Need]:
        """Nothing but a request tells whether it was started with --reranking. This one is wrong either way: 400 or
        501."""
        status, _ = await ask("/v1/rerank", {})
        return frozenset({"rerank"}) if status in (404, 501) else frozenset()

    def repair_whole(self, request: BackendRequest, data: bytes) -> bytes:
        return super().repair_whole(request, _as_vllm_tokenizes(request, data))

    def asks_for_stream(self, request: BackendRequest) -> bool:
        """Always, since it cancels only streams."""
        return request.features.endpoint != "embeddings"

    def stream_editor(self, request: BackendRequest) -> StreamEditor:
        legacy = request.features.endpoint == "completions" and "logprobs" in request.features.needs
        return LegacyLogprobsEditor(request) if legacy else LlamaServerEditor(request)

    def can_resume(self, features: Features, template: ChatTemplate | None) -> bool:
        return True

    def resume_reasoning(self, request: BackendRequest, reasoning: str, text: str | None) -> Sequence[BackendRequest]:
        """It writes the tags of the model's template itself."""
        message = {"role": "assistant", "content": text or "", "reasoning_content": reasoning}
        return (continuing(request, message),) if reasoning else ()

    async def count_tokens(self, request: BackendRequest, text: str, post: Post) -> int | None:
        tokens = await self.token_ids(request.served, text, post)
        return None if tokens is None else len(tokens)

    async def count_chat(self, request: BackendRequest, post: Post) -> int | None:
        status, answer = await post("/v1/chat/completions/input_tokens", self.prepared(request))
        return count(answer.get("input_tokens")) if status == 200 and isinstance(answer, dict) else None

    async def token_ids(self, model: str, text: str, post: Post) -> list[int] | None:
        return await self.tokenize({"content": text, "add_special": False}, post)


class LlamaServerEditor:
    """One usage, one `created`, and a role chunk in every case: llama-server omits it if the answer begins with a
    character of several tokens, such as an emoji."""

    done = False

    def __init__(self, request: BackendRequest) -> None:
        self._request = request
        chat = request.features.endpoint == "chat"
        self._roles_to_come = set(range(request.choices)) if chat else set()
        self._holds_usage = not chat or request.choices > 1
        self._created: bytes | None = None
        self._usages: list[Json] = []
        self._last: Json = {}

    def edit(self, block: bytes) -> bytes:
        if self._holds_usage and (b'"usage":' in block or b"data: null" in block):
            block = b"".join(sse.encode(chunk) for chunk in sse.parse_chunks(block) if not self._hold_usage(chunk))
        if not block:
            return b""
        if self._roles_to_come:
            block = self._with_roles(block)
        return self._with_one_created(block)

    async def finish(self, post: Post) -> bytes:
        if not self._usages or not self._request.features.include_usage:
            return b""
        usage = joined_usage(self._usages, self._request.body.get("n") or 1)
        return self._with_one_created(sse.encode({**self._last, "choices": [], "usage": usage}))

    def _with_one_created(self, block: bytes) -> bytes:
        if self._created is None:
            created = CREATED.search(block)
            self._created = created.group() if created else b'"created":0'
        return rename_model(self._request, CREATED.sub(self._created, block))

    def _with_roles(self, block: bytes) -> bytes:
        out = []
        for event in sse.events(block):
            for chunk in sse.parse_chunks(event):
                first = [choice for choice in chunk["choices"] if choice["index"] in self._roles_to_come]
                self._roles_to_come -= {choice["index"] for choice in first}
                missing = [role(choice["index"]) for choice in first if "role" not in choice.get("delta", ())]
                out += [sse.encode({**chunk, "choices": [each]}) for each in missing]
            out.append(event)
        return b"".join(out)

    def _hold_usage(self, chunk: Json) -> bool:
        """Takes the usage out of a chunk. Returns whether nothing else was in it.

        Each of several choices has a usage of its own, and a completion's comes with its last chunk. finish() sends the
        sum.
        """
        usage = chunk.pop("usage", None)
        if usage is None:
            return False
        self._usages.append(usage)
        self._last = chunk
        return not chunk["choices"]


def role(index: int) -> Json:
    """The choice that must come first."""
    return {"index": index, "delta": {"role": "assistant", "content": None}, "finish_reason": None}


class LegacyLogprobsEditor(LlamaServerEditor):
    """llama-server sends logprobs in chat's shape on /v1/completions too."""

    def __init__(self, request: BackendRequest) -> None:
        super().__init__(request)
        self._offsets: dict[int, int] = {}  # characters so far, by choice

    def edit(self, block: bytes) -> bytes:
        return b"".join(sse.encode(self._repair(chunk)) for chunk in sse.parse_chunks(super().edit(block)))

    def _repair(self, chunk: Json) -> Json:
        for choice in chunk["choices"]:
            offset = self._offsets.get(choice["index"], 0)
            choice["logprobs"] = legacy_logprobs(choice.get("logprobs"), offset)
            self._offsets[choice["index"]] = offset + len(choice.get("text", ""))
        return chunk
