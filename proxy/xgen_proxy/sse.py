"""Server-sent events as the backends send them: `data: {json}` and a blank line; `data: [DONE]` closes.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from xgen_proxy.errors import UpstreamProtocolError

DONE = b"data: [DONE]\n\n"
ROLE = re.compile(rb'"delta": ?\{"role": ?"assistant"(?:, ?"content": ?(?:""|null))?\}')
MAX_EVENT = 8 * 1024 * 1024  # an event that never ends must not fill the memory


class EventSplitter:
    """Cuts a byte stream where events end, without copying when a read ends with an event, as nearly all do."""

    __slots__ = ("rest",)

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Returns the whole events that have come, b"" if none; keeps what is cut short. Raises UpstreamProtocolError."""
        if self.rest:
            data = self.rest + data
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            self.rest = b""
            return data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        if end < 4:  # neither found: 1 and 3
            end = 0
        self.rest = data[end:]
        if len(self.rest) > MAX_EVENT:
            raise UpstreamProtocolError(f"an event of more than {MAX_EVENT} bytes")
        return data[:end]


def are_ordinary(data: bytes) -> bool:
    """Whole events, each of which goes on with the one choice, unfinished? No error, end or usage is among them."""
    return data.endswith(b"\n\n") and data.count(b"data: ") == data.count(b'"finish_reason":null')


def has_line(block: bytes, start: bytes) -> bool:
    """Is there a line that begins so? JSON escapes newlines, so that nothing a model writes can look like a line."""
    return block.startswith(start) or b"\n" + start in block


def is_error(block: bytes) -> bool:
    return has_line(block, b'data: {"error"') or has_line(block, b"error:")


def finishes(block: bytes) -> int:
    """How many choices end in this block. Inside a JSON string the quotes would be escaped."""
    return block.count(b'"finish_reason":"') + block.count(b'"finish_reason": "')


def only_role(block: bytes) -> bool:
    """Is it a single chunk that says no more than whose turn it is?"""
    return block.count(b"data: {") == 1 and ROLE.search(block) is not None and not finishes(block)


def is_abort(block: bytes) -> bool:
    return b'"finish_reason":"abort"' in block


def split_done(block: bytes) -> tuple[bytes, bool]:
    """(events before `data: [DONE]`, whether it came)."""
    if block.startswith(b"data: [DONE]"):
        return b"", True
    at = block.find(b"\ndata: [DONE]")
    return (block, False) if at < 0 else (block[: at + 1], True)


def payloads(block: bytes) -> Iterator[bytes]:
    """The data of each event; comments and other fields are passed over."""
    for line in block.splitlines():
        if line.startswith(b"data:"):
            yield line[5:].lstrip(b" ")


def events(block: bytes) -> Iterator[bytes]:
    """Each whole event with its closing blank line."""
    separator = b"\r\n\r\n" if b"\r\n\r\n" in block else b"\n\n"
    for event in block.split(separator):
        if event:
            yield event + separator


def comment(text: str) -> bytes:
    """A comment, for people who read the raw stream; clients ignore it."""
    return b": " + text.encode("ascii", "replace").replace(b"\n", b" ") + b"\n\n"
