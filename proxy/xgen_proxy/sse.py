"""Server-sent events as the backends send them: `data: {json}` and a blank line each, and `data: [DONE]` at the end.

https://html.spec.whatwg.org/multipage/server-sent-events.html

The functions below search the bytes of complete events instead of parsing them. That is safe because JSON escapes
quotes and newlines inside a string: nothing that a model writes can look like a field or a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from xgen_proxy.errors import UpstreamProtocolError

DONE = b"data: [DONE]\n\n"
ROLE = re.compile(rb'"delta": ?\{"role": ?"assistant"(?:, ?"content": ?(?:""|null))?\}')
MAX_EVENT = 8 * 1024 * 1024  # bytes; an event that never ends must not fill the memory


class EventSplitter:
    """Cuts a byte stream at the end of events. A read that ends with an event, as nearly all do, is not copied."""

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending = b""  # the beginning of an event whose end has not arrived

    def feed(self, data: bytes) -> bytes:
        """Return the events that are complete now, b"" if none. Raises UpstreamProtocolError."""
        if self.pending:
            data = self.pending + data
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            self.pending = b""
            return data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        if end < 4:  # neither was found: rfind() returned -1, which gives 1 and 3
            end = 0
        self.pending = data[end:]
        if len(self.pending) > MAX_EVENT:
            raise UpstreamProtocolError(f"an event of more than {MAX_EVENT} bytes")
        return data[:end]


def are_unfinished_chunks(data: bytes) -> bool:
    """Whether these are complete events, each a chunk of one choice that has not finished.

    If so, there is no error, no end and no usage among them. A text that contains "data: " gives False, which is safe.
    """
    return data.endswith(b"\n\n") and data.count(b"data: ") == data.count(b'"finish_reason":null')


def has_line_starting(block: bytes, prefix: bytes) -> bool:
    return block.startswith(prefix) or b"\n" + prefix in block


def is_error(block: bytes) -> bool:
    return has_line_starting(block, b'data: {"error"') or has_line_starting(block, b"error:")


def count_finished(block: bytes) -> int:
    """Number of choices that finish in this block."""
    return block.count(b'"finish_reason":"') + block.count(b'"finish_reason": "')


def is_role_only(block: bytes) -> bool:
    """Whether this is a single chunk that contains nothing but the role."""
    return block.count(b"data: {") == 1 and ROLE.search(block) is not None and not count_finished(block)


def is_abort(block: bytes) -> bool:
    return b'"finish_reason":"abort"' in block


def split_done(block: bytes) -> tuple[bytes, bool]:
    """(the events before `data: [DONE]`, whether it arrived)."""
    if block.startswith(b"data: [DONE]"):
        return b"", True
    at = block.find(b"\ndata: [DONE]")
    return (block, False) if at < 0 else (block[: at + 1], True)


def payloads(block: bytes) -> Iterator[bytes]:
    """The data of each event, without comments and other fields."""
    for line in block.splitlines():
        if line.startswith(b"data:"):
            yield line[5:].lstrip(b" ")


def events(block: bytes) -> Iterator[bytes]:
    """Each complete event with its closing blank line."""
    separator = b"\r\n\r\n" if b"\r\n\r\n" in block else b"\n\n"
    for event in block.split(separator):
        if event:
            yield event + separator


def comment(text: str) -> bytes:
    """A comment, for people who read the raw stream; clients ignore it."""
    return b": " + text.encode("ascii", "replace").replace(b"\n", b" ") + b"\n\n"


def encode(data: Any) -> bytes:
    """An event with `data` as JSON."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def parse_chunks(block: bytes) -> Iterator[dict[str, Any]]:
    """The chunks in these events. Raises UpstreamProtocolError.

    Skips `[DONE]`, and the null with which llama-server begins a stream for several prompts.
    """
    for data in payloads(block):
        if data in (b"[DONE]", b"null"):
            continue
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise UpstreamProtocolError(f"an event that is not JSON: {error}") from None
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            raise UpstreamProtocolError("an event without choices")
        yield chunk
