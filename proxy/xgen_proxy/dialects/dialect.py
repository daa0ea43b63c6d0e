"""Dialect: everything that distinguishes one engine from another.

The base class is any OpenAI-compatible server. Each engine overrides what it does differently in a module of its own;
`docs/dialects.md` tells users the same, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import orjson

from xgen_proxy.dialects.backend_request import Ask, BackendRequest, ModelFacts, Post, ReplicaInfo
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.request_rules import FORM_FIELDS, INTERNALS, MODEL_NAME, Rule
from xgen_proxy.dialects.stream_collector import StreamCollector
from xgen_proxy.dialects.stream_editors import ModelName, StreamEditor, rename_model
from xgen_proxy.errors import ProxyError, UpstreamError, UpstreamProtocolError
from xgen_proxy.request.features import NEEDS, Features, Json, Need
from xgen_proxy.sse import EventSplitter

MAX_MODELS = 1_000  # of one replica
MAX_MODEL_NAME = 512  # characters


def count(value: object, limit: int = 2**31) -> int | None:
    """A number of slots or tokens that a replica reports, if it is one."""
    return value if isinstance(value, int) and 0 < value < limit else None


def model_facts(meta: object) -> ModelFacts | None:
    """What llama-server says of its model in a card of /v1/models. It does not tell the number of layers."""
    if not isinstance(meta, dict):
        return None
    quantization = meta.get("ftype")
    return ModelFacts(
        vocabulary=count(meta.get("n_vocab")),
        context=count(meta.get("n_ctx_train")),
        width=count(meta.get("n_embd")),
        parameters=count(meta.get("n_params"), 2**50),
        bytes=count(meta.get("size"), 2**50),
        quantization=quantization if isinstance(quantization, str) and len(quantization) <= 64 else None,
    )


def continuing(request: BackendRequest, message: Json) -> BackendRequest:
    """The request with an assistant's message at its end, which the engine continues."""
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    return replace(request, body={**request.body, "messages": [*request.body["messages"], message], **flags})


class Dialect:
    """The attributes are facts about the engine; the methods are what it takes to talk to it."""

    name: ClassVar[str]
    device_class: ClassVar[str] = "gpu"  # where it usually runs
    capabilities: ClassVar[frozenset[str]] = NEEDS  # unless the settings or the replica say otherwise
    why_no_embeddings: ClassVar[str] = ""  # if not empty, embeddings cannot be turned on for it
    why_no_images: ClassVar[str] = ""  # the same for images
    slots: ClassVar[int] = 64  # requests that a replica runs at once, unless something says otherwise
    overcommit: ClassVar[int] = 0  # requests sent beyond the slots, so that a free slot never waits for the network
    health_path: ClassVar[str] = "/v1/models"  # takes no lock and waits for no slot
    health_path_in_use: ClassVar[str | None] = None  # asked instead while requests of ours run there
    metrics_path: ClassVar[str | None] = None  # the one of these two that is a page of Prometheus metrics
    info_paths: ClassVar[tuple[str, ...]] = ("/v1/models",)  # asked when a replica comes up, and again if they change
    models_change: ClassVar[bool] = True  # its models may change while it runs: LoRA, llama-swap, Ollama
    swaps_models: ClassVar[bool] = True  # a question about one of several models may load it
    uses_canary: ClassVar[bool] = False  # asked for one token when in doubt; not where tokens may cost money
    hides_hangs: ClassVar[bool] = False  # a process of its own answers health checks for the engine
    relief_paths: ClassVar[Mapping[str, str]] = {}  # kind of relief → a POST that frees memory, if the engine has it
    sends_request_id: ClassVar[bool] = True
    reuse_after_stream: ClassVar[bool] = True  # a connection can serve again after a stream
    separates_reasoning: ClassVar[bool] = True  # it never sends reasoning as text, if started rightly
    labels_by_prompt: ClassVar[bool] = False  # text is called reasoning if no tag in the prompt ends the reasoning
    resumes_constrained: ClassVar[frozenset[str]] = frozenset()  # needs whose grammar it can enter in the middle
    event_splitter: ClassVar[type[EventSplitter]] = EventSplitter  # its bytes are tested; see sse.py
    rules: ClassVar[tuple[Rule, ...]] = ()
    opaque_rules: ClassVar[tuple[Rule, ...]] = (MODEL_NAME, INTERNALS)  # for the endpoints of request/opaque

    # what a replica reports

    def parse_info(self, answers: Mapping[str, Any]) -> ReplicaInfo:
        """`answers` by path, None where there was none. Raises any Exception if one is malformed."""
        cards = answers["/v1/models"]["data"][:MAX_MODELS]
        names = tuple(str(card["id"]) for card in cards)
        return ReplicaInfo(
            tuple(name for name in names if len(name) <= MAX_MODEL_NAME),
            context=self.context_length(cards),
            model=model_facts(cards[0].get("meta")) if len(cards) == 1 else None,
        )

    def context_length(self, cards: list[Json]) -> int | None:
        """In tokens, from the cards of /v1/models: `max_model_len` in vLLM's, `meta.n_ctx` in llama-server's."""
        lengths = [card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx") for card in cards]
        return min(filter(None, map(count, lengths)), default=None)

    async def missing_media(self, model: str, post: Post) -> frozenset[Need]:
        """The kinds of media in `capabilities` that a replica cannot read. Called when it comes up, for engines whose
        info does not say it. Nothing is generated. Raises UpstreamError."""
        return frozenset()

    async def missing_routes(self, ask: Ask) -> frozenset[Need]:
        """The capabilities that a replica lacks because it has no route for them; empty if it does not tell. Asked when
        it comes up. Raises UpstreamError, or any Exception if the answer is malformed."""
        return frozenset()

    # the request

    def path(self, request: BackendRequest) -> str:
        return request.path

    def prepare(self, request: BackendRequest) -> bytes:
        """The request body for this engine. Raises BadRequestError, whose message says what to change."""
        if request.form is not None:
            return request.form.encoded(request.served, FORM_FIELDS)
        body = self.prepared(request)
        if body is request.body and request.raw is not None:
            return request.raw
        return orjson.dumps(body)

    def prepared(self, request: BackendRequest) -> Json:
        body = request.body
        for rule in self.opaque_rules if request.opaque else self.rules:
            body = rule.apply(body, request)
        return body

    def asks_for_stream(self, request: BackendRequest) -> bool:
        """Whether the engine is asked for a stream, whatever the client wants."""
        return request.features.stream

    # the response

    def stream_editor(self, request: BackendRequest) -> StreamEditor | None:
        """Repairs the stream on its way to the client. None if it can pass as it is."""
        return ModelName(request) if request.alias != request.served else None

    def stream_collector(self, request: BackendRequest) -> StreamCollector:
        """Collects a stream into the whole response that the engine itself would have given."""
        return StreamCollector(request)

    def repair_whole(self, request: BackendRequest, data: bytes) -> bytes:
        """Repairs a whole response. Raises RequestRejectedError if it is not what was asked for, and
        UpstreamProtocolError if it is malformed."""
        return rename_model(request, data)

    async def explain_empty_stream(self, request: BackendRequest, post: Post) -> ProxyError | UpstreamError:
        """The meaning of a stream without a single event."""
        return UpstreamProtocolError("the stream was empty")

    # resuming a stream that broke elsewhere

    def can_resume(self, features: Features, template: ChatTemplate | None) -> bool:
        """Whether the engine can continue a text that it is given. `template`: the model's, if it is configured."""
        return False

    def resume_chat(self, request: BackendRequest, prefix: str, template: ChatTemplate | None) -> BackendRequest:
        """The request that continues the assistant's message after `prefix`, which is not empty.

        Raises UnsupportedByBackendError if the template fails.
        """
        return continuing(request, {"role": "assistant", "content": prefix})

    def resume_reasoning(self, request: BackendRequest, reasoning: str, text: str | None) -> Sequence[BackendRequest]:
        """The requests that may make the engine go on after this reasoning, the likeliest first. `text` follows the
        reasoning; None if the model still reasons. The first output shows whether the engine understood."""
        return ()

    async def count_tokens(self, request: BackendRequest, text: str, post: Post) -> int | None:
        """Number of tokens in `text`, as the replica counts them. None if it cannot. Raises UpstreamError."""
        return None

    async def count_chat(self, request: BackendRequest, post: Post) -> int | None:
        """Number of tokens of a chat's prompt, as the model's template writes it. None if the replica cannot tell.
        Raises UpstreamError, BadRequestError."""
        return None

    async def token_ids(self, model: str, text: str, post: Post) -> list[int] | None:
        """The tokens of `text` without special ones. None if the engine cannot tell. Raises UpstreamError."""
        return None

    async def tokenize(self, question: Json, post: Post, path: str = "/tokenize") -> list[int] | None:
        """From a route of vLLM and llama-server, whose fields differ."""
        status, answer = await post(path, question)
        tokens = answer.get("tokens") if status == 200 and isinstance(answer, dict) else None
        return tokens if isinstance(tokens, list) else None
