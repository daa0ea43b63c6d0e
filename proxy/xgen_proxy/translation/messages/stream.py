"""The pieces of a chat's stream as the events of a message's stream.

    message_start, then for each block: content_block_start, content_block_delta …, content_block_stop;
    at the end message_delta and message_stop. https://docs.claude.com/en/docs/build-with-claude/streaming

Blocks follow each other, while the pieces of several tool calls may alternate. What does not belong to the open call is
held until that call's arguments are complete.
"""

from __future__ import annotations

from typing import Literal

import orjson

from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import Failure, Finish, Piece, Reasoning, Text, ToolCallPiece, Usage
from xgen_proxy.translation.messages.errors import error_event
from xgen_proxy.translation.messages.response import SIGNATURE, stop_reason, usage_of

Kind = Literal["text", "thinking"]
Content = Text | Reasoning | ToolCallPiece
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def event(name: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **fields}))


class MessageStream:
    """`prompt_tokens`: an estimate, since clients read the input's size in the first event. The last one has the exact
    figures."""

    def __init__(self, id: str, model: str, prompt_tokens: int, request_id: str) -> None:
        self._id = id
        self._model = model
        self._request_id = request_id
        self._estimate = prompt_tokens
        self._started = False
        self._blocks = 0
        self._open: Kind | int | None = None  # the block; of a tool call its index
        self._arguments: list[str] = []  # of the open tool call
        self._held: list[Content] = []
        self._calls: dict[int, str] = {}  # the tool calls so far, by index: their ids
        self._pieces = 0
        self._finish = Finish("stop")
        self._usage: Usage | None = None

    def ping(self) -> bytes:
        return self._start() + PING

    def feed(self, piece: Piece) -> bytes:
        if isinstance(piece, Failure):
            return self._start() + error_event(piece.error, self._request_id)
        if isinstance(piece, Usage):
            self._usage = piece
        elif isinstance(piece, Finish):
            self._finish = piece
        else:
            self._pieces += 1
            return self._start() + self._content(piece)
        return self._start()

    def end(self) -> bytes:
        out = [self._start(), self._release(), self._close()]
        if not self._blocks:  # some clients read the first block unasked
            out += [self._begin(Text("")), self._close()]
        reason, stop = stop_reason(self._finish, called=bool(self._calls))
        usage = self._usage or Usage(self._estimate, self._pieces)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        out += [event("message_delta", delta=delta, usage=usage_of(usage)), event("message_stop")]
        return b"".join(out)

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        message: Json = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(Usage(max(self._estimate, 1), 1)),
        }
        return event("message_start", message=message)

    def _content(self, piece: Content) -> bytes:
        key = _key(piece)
        if key == self._open:
            return self._delta(piece)
        if isinstance(piece, ToolCallPiece) and piece.id in ("", self._calls.get(piece.index)) and key in self._calls:
            return b""  # spaces after the end of its arguments
        if self._held or (isinstance(self._open, int) and not is_json("".join(self._arguments))):
            self._held.append(piece)
            return b""
        return self._close() + self._begin(piece) + self._delta(piece)

    def _release(self) -> bytes:
        """What was held, block by block."""
        blocks: dict[Kind | int, list[Content]] = {}
        for piece in self._held:
            blocks.setdefault(_key(piece), []).append(piece)
        out = [[self._close(), self._begin(pieces[0]), *map(self._delta, pieces)] for pieces in blocks.values()]
        return b"".join(part for block in out for part in block)

    def _begin(self, piece: Content) -> bytes:
        self._open = _key(piece)
        block: Json
        if isinstance(piece, Text):
            block = {"type": "text", "text": ""}
        elif isinstance(piece, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            self._arguments = []
            self._calls[piece.index] = piece.id
            id = piece.id or f"toolu_{self._request_id}_{piece.index}"
            block = {"type": "tool_use", "id": id, "name": piece.name, "input": {}}
        return event("content_block_start", index=self._blocks, content_block=block)

    def _delta(self, piece: Content) -> bytes:
        delta: Json
        if isinstance(piece, Text):
            delta = {"type": "text_delta", "text": piece.text}
        elif isinstance(piece, Reasoning):
            delta = {"type": "thinking_delta", "thinking": piece.text}
        elif not piece.arguments:
            return b""
        else:
            self._arguments.append(piece.arguments)
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
        return event("content_block_delta", index=self._blocks, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signature = b""
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            signature = event("content_block_delta", index=self._blocks, delta=delta)
        closing = signature + event("content_block_stop", index=self._blocks)
        self._open = None
        self._blocks += 1
        return closing


def _key(piece: Content) -> Kind | int:
    if isinstance(piece, ToolCallPiece):
        return piece.index
    return "text" if isinstance(piece, Text) else "thinking"


def is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
