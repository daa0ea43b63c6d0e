"""What passes between the relay and the dialects: a request for one backend, and who puts its answer right."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.features import Features

Json = dict[str, Any]
Post = Callable[[str, Json], Awaitable[tuple[int, Any]]]
"""(path, body) → (status, JSON) of the same replica, whose slot is still ours. Raises UpstreamFailed."""


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

    @property
    def choices(self) -> int:
        """How many choices a whole answer has, each with a finish_reason of its own."""
        n = self.body.get("n") or 1
        return (n if isinstance(n, int) else 1) * self.prompts

    @property
    def prompts(self) -> int:
        """/v1/completions takes a list of prompts, or of token lists. One list of token ids is one prompt."""
        prompt = self.body.get("prompt")
        return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


class Editor(Protocol):
    """Puts one stream right on its way through."""

    def edit(self, block: bytes) -> bytes:
        """`block`: one or more whole SSE events, never the closing `data: [DONE]`."""

    async def finish(self, post: Post) -> bytes:
        """Events to add before `data: [DONE]`, such as the usage chunk. The replica's slot is still ours."""
