"""What vLLM, llama-server and llama-cpp-python each are, and where their peculiarities are dealt with.

    bodies.py    RULES: the one table of what is renamed, filled in, dropped or refused in a request
    verdicts.py  error bodies and error events → OpenAI's shape, or "try another backend"
    editors.py   what is repaired in a stream on its way through
    aggregate.py a stream put together to the whole answer

`docs/dialects.md` tells the same for people; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xgen_proxy.request.features import NEEDS, Features

Json = dict[str, Any]
Name = Literal["vllm", "llama-server", "llama-cpp-python", "openai"]

# (path, body) → (status, JSON answer) of the same replica, while its slot is ours. Raises UpstreamError.
Post = Callable[[str, Json], Awaitable[tuple[int, Any]]]


@dataclass(slots=True)
class BackendRequest:
    """`body`: the client's JSON without our hints and with presets filled in. `raw`: the client's own bytes where they
    still say the same as `body`, else None. `alias`: the public model name the answer must carry. `served`: the name
    the chosen backend knows the model by. `context`: its context length in tokens, where that is known."""

    features: Features
    body: Json
    raw: bytes | None
    alias: str
    served: str
    context: int | None = None

    @property
    def choices(self) -> int:
        """How many finish_reasons the answer has."""
        return self.prompts * (self.body.get("n") or 1)

    @property
    def prompts(self) -> int:
        prompt = self.body.get("prompt")
        return len(prompt) if "prompt_list" in self.features.needs and isinstance(prompt, list) else 1

    @property
    def path(self) -> str:
        return {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}[
            self.features.endpoint
        ]


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What one replica says of itself. None: it does not say. `can` replaces the dialect's."""

    models: tuple[str, ...]
    context: int | None = None
    slots: int | None = None
    capabilities: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """`can`: what it can do unless settings or the replica say otherwise. `slots`: requests a replica runs at once,
    where nobody says. `margin`: how many more it may be sent, so that a free slot never waits for the network.
    `streams_only`: it cancels only streams, so that whole answers are streamed from it and put together here.
    `look_path`: takes no lock and waits for no slot; any answer below 500 is a sign of life. `probe_paths`: asked once
    when a replica comes up."""

    name: Name
    capabilities: frozenset[str]
    slots: int
    overcommit: int
    streams_only: bool
    reuse_after_stream: bool
    health_path: str
    has_metrics: bool
    info_paths: tuple[str, ...]
    continues_chat: bool = False  # takes the beginning of the assistant's message as such
    continues_text: bool = False
    uses_canary: bool = False  # asked for a token when in doubt; not where tokens may cost money
    hides_hangs: bool = False  # a process of its own answers looks for the engine
    tokenize: bool = False  # counts tokens for us where it sends no usage
    request_id: bool = True  # False: answers 400 to an X-Request-Id that is not a UUID

    def parse_info(self, answers: Mapping[str, Any]) -> ReplicaInfo:
        """Raises KeyError or TypeError for an answer that is none."""
        cards = answers["/v1/models"]["data"]
        probe = ReplicaInfo(tuple(str(card["id"]) for card in cards), context=_context(cards))
        props = answers.get("/props")
        return _with_props(probe, props, self.capabilities) if isinstance(props, dict) else probe


def _context(cards: list[Json]) -> int | None:
    """vLLM calls it max_model_len; llama-server meta.n_ctx, per slot."""
    lengths = [card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx") for card in cards]
    return min((int(length) for length in lengths if length), default=None)


def _with_props(probe: ReplicaInfo, props: Json, capabilities: frozenset[str]) -> ReplicaInfo:
    tools = bool((props.get("chat_template_caps") or {}).get("supports_tools"))
    images = bool((props.get("modalities") or {}).get("vision"))
    capabilities = capabilities | ({"tools", "forced_tool"} if tools else set()) | ({"images"} if images else set())
    return ReplicaInfo(probe.models, probe.context, props.get("total_slots"), capabilities)


VLLM = Dialect(
    name="vllm",
    capabilities=NEEDS - {"grammar", "embeddings"},
    slots=256,  # vLLM's own default of --max-num-seqs
    overcommit=16,
    streams_only=False,
    reuse_after_stream=True,
    health_path="/metrics",
    has_metrics=True,
    info_paths=("/v1/models",),
    continues_chat=True,
    continues_text=True,
    uses_canary=True,
    hides_hangs=True,
)

LLAMA_SERVER = Dialect(
    name="llama-server",
    capabilities=NEEDS - {"structured_outputs", "embeddings", "tools", "forced_tool", "images", "echo", "suffix"},
    slots=4,
    overcommit=0,  # it queues without bound
    streams_only=True,
    reuse_after_stream=False,  # it closes the connection after a stream although it advertises keep-alive
    health_path="/metrics",
    has_metrics=True,
    info_paths=("/v1/models", "/props"),
    continues_chat=True,
    continues_text=True,
    uses_canary=True,
)

LLAMA_CPP_PYTHON = Dialect(
    name="llama-cpp-python",
    capabilities=frozenset({"forced_tool", "logprobs", "json_object", "json_schema", "echo"}),
    slots=1,
    overcommit=0,  # one global lock
    streams_only=True,
    reuse_after_stream=True,
    health_path="/health",  # 404, without the lock; it has no health route, and /openapi.json has 40 KB
    has_metrics=False,
    info_paths=("/v1/models",),
    continues_text=True,
    uses_canary=True,
    tokenize=True,
    request_id=False,
)

OPENAI = Dialect(
    name="openai",
    capabilities=NEEDS,
    slots=64,
    overcommit=0,
    streams_only=False,
    reuse_after_stream=True,
    health_path="/v1/models",
    has_metrics=False,
    info_paths=("/v1/models",),
)

DIALECTS: dict[str, Dialect] = {each.name: each for each in (VLLM, LLAMA_SERVER, LLAMA_CPP_PYTHON, OPENAI)}
