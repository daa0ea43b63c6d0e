"""What is asked of a backend, and what a replica reports about itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from xgen_proxy.request.features import Features, Json, Need
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.request.opaque.multipart import Form
from xgen_proxy.values import frozen

# (path, body) → (status, JSON). Asks the same replica, while a slot of it is held. Raises UpstreamError.
Post = Callable[[str, Json], Awaitable[tuple[int, Any]]]
Ask = Callable[[str, Json | None], Awaitable[tuple[int, Any]]]  # the same; None: a GET

PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    **{name: endpoint.path for name, endpoint in OPAQUE.items()},
}


@frozen
class BackendRequest:
    """A request as asked of one backend.

    `body` is the client's JSON without our hints and with presets filled in. `raw` is the client's own bytes while they
    still say the same as `body`, else None. `alias` is the name that the client sent, which the response must carry.
    `served` is the name that the backend knows the model by. `context` is its context length in tokens, if known.
    `form`: the request is a multipart form.
    """

    features: Features
    body: Json
    raw: bytes | None
    alias: str
    served: str
    context: int | None = None
    form: Form | None = None

    @property
    def choices(self) -> int:
        """Number of choices, and so of finish reasons, in the response."""
        return self.prompts * (self.body.get("n") or 1)

    @property
    def prompts(self) -> int:
        prompt = self.body.get("prompt")
        return len(prompt) if "prompt_list" in self.features.needs and isinstance(prompt, list) else 1

    @property
    def path(self) -> str:
        return PATHS[self.features.endpoint]

    @property
    def opaque(self) -> Need | None:
        """The capability that the endpoint is, if the request and its answer pass unread."""
        endpoint = OPAQUE.get(self.features.endpoint)
        return endpoint.need if endpoint else None


@frozen
class ModelFacts:
    """The size and shape of a model; None where it is unknown.

    `context`: tokens that it was trained on. `width`: of its embeddings. `bytes`: of its weights.
    """

    vocabulary: int | None = None
    context: int | None = None
    layers: int | None = None
    width: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    quantization: str | None = None


@frozen
class ReplicaInfo:
    """What a replica reports about itself; None where it does not say. `capabilities` replace the dialect's."""

    models: tuple[str, ...]
    context: int | None = None
    slots: int | None = None
    capabilities: frozenset[str] | None = None
    model: ModelFacts | None = None
