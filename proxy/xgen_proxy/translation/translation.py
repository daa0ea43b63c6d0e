"""What it takes to translate an API to chat completions and back. The translations are pure; the writer sends them."""

from __future__ import annotations

from typing import Protocol

from xgen_proxy.errors import ProxyError
from xgen_proxy.request.call import Call
from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import Piece


class StreamTranslation(Protocol):
    """One stream: pieces of a chat in, events of the other API out.

    Each method returns b"" if there is nothing to send. The first event of the stream is part of the first result.
    """

    def ping(self) -> bytes:
        """What keeps the connection alive while there is no output."""

    def feed(self, piece: Piece) -> bytes:
        """The events for this piece. A Failure ends the stream: neither feed() nor end() is called after it."""

    def end(self) -> bytes:
        """The events that close a complete answer."""


class Translation(Protocol):
    """One request. `body` is the chat completion that asks for the same. `dropped`: what it cannot ask for."""

    body: Json
    dropped: tuple[str, ...]

    def whole(self, data: bytes, call: Call) -> bytes:
        """The answer for a whole chat completion. Raises BadGatewayError for anything else."""

    def stream(self, call: Call) -> StreamTranslation: ...


class Api(Protocol):
    """One API."""

    def translate(self, body: Json) -> Translation:
        """Raises BadRequestError, which names the field of this API and what it should be."""

    def error(self, error: ProxyError, request_id: str) -> tuple[int, bytes]:
        """The status and the body of an error response."""

    def fails_in_stream(self, error: ProxyError, originator: bytes) -> bool:
        """Whether a client that asked for a stream understands this error only as an event of one. `originator`: the
        header by which Codex names itself, b"" if there is none."""
