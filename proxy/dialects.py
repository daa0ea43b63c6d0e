"""What vLLM, llama-server and llama-cpp-python each need changed, refused or repaired. Pure, but for `Editor.finish`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.features import Features

Json = dict[str, Any]
Post = Callable[[str, Json], Awaitable[Json]]  # (path, body) → the answer of the same replica; raises UpstreamFailed


@dataclass(frozen=True, slots=True)
class Request:
    """`body`: the client's JSON without our hints and with presets filled in. `raw`: the client's own bytes where they
    still say the same as `body`, else None. `alias`: the public model name the answer must carry. `served`: the name
    the chosen backend knows the model by."""

    features: Features
    body: Json
    raw: bytes | None
    alias: str
    served: str


class Editor(Protocol):
    """Puts one stream right on its way through."""

    def edit(self, block: bytes) -> bytes:
        """`block`: one or more whole SSE events, never the closing `data: [DONE]`."""

    async def finish(self, post: Post) -> bytes:
        """Events to add before `data: [DONE]`, such as the usage chunk. The replica's slot is still ours."""
