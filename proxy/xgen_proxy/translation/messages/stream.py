"""The pieces of a chat's stream as the events of a message's stream.

message_start, then for each block: content_block_start, content_block_delta …, content_block_stop;
at the end message_delta and message_stop. https://docs.claude.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

import orjson

from xgen_proxy import sse
from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import Failure, Finish, Piece, Reasoning, Text, Usage
from xgen_proxy.translation.messages.errors import error_event
from xgen_proxy.translation.messages.response import SIGNATURE, stop_reason, usage_of
from xgen_proxy.translation.piece_order import Content, Key, PieceOrder, key_of


def event(name: str, **fields: object) -> bytes:
    return sse.named_event(name, orjson.dumps({"type": name, **fields}))


class MessageStream:
    """`prompt_tokens`: an estimate, since clients read the input's size in the first event. The last one has the exact
    figures."""

    def __init__(self, request_id: str, model: str, prompt_tokens: int) -> None:
        self._request_id = request_id
        self._model = model
        self._estimate = prompt_tokens
        self._started = False
        self._blocks = 0
        self._order = PieceOrder()
        self._open: Key | None = None
        self._pieces = 0
        self._finish = Finish("stop")
        self._usage: Usage | None = None

    def ping(self) -> bytes:
        return self._start() + event("ping")

    def feed(self, piece: Piece) -> bytes:
        if isinstance(piece, Failure):
            return self._start() + error_event(piece.error, self._request_id)
        if isinstance(piece, Usage):
            self._usage = piece
        elif isinstance(piece, Finish):
            self._finish = piece
        else:
            self._pieces += 1
            return self._start() + b"".join(map(self._content, self._order.add(piece)))
        return self._start()

    def end(self) -> bytes:
        out = [self._start(), *map(self._content, self._order.rest()), self._close()]
        if not self._blocks:  # some clients read the first block unasked
            out += [self._begin(Text("")), self._close()]
        reason, stop = stop_reason(self._finish, called=self._order.called)
        usage = self._usage or Usage(self._estimate, self._pieces)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        out += [event("message_delta", delta=delta, usage=usage_of(usage)), event("message_stop")]
        return b"".join(out)

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        message: Json = {
            "id": f"msg_{self._request_id}",
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
        opening = b"" if key_of(piece) == self._open else self._close() + self._begin(piece)
        return opening + self._delta(piece)

    def _begin(self, piece: Content) -> bytes:
        self._open = key_of(piece)
        block: Json
        if isinstance(piece, Text):
            block = {"type": "text", "text": ""}
        elif isinstance(piece, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
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
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
        return event("content_block_delta", index=self._blocks, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signature = b""
        if self._open == "reasoning":
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            signature = event("content_block_delta", index=self._blocks, delta=delta)
        closing = signature + event("content_block_stop", index=self._blocks)
        self._open = None
        self._blocks += 1
        return closing
