"""The pieces of a stream in the order of the answer's blocks, since the pieces of several tool calls may alternate.

A piece of another block that arrives before the open call is complete is held until the end of the stream, and so is
every later piece outside that call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import orjson

from xgen_proxy.translation.chat import Reasoning, Text, ToolCallPiece

Content = Text | Reasoning | ToolCallPiece
Key = str | int  # of a block: the kind of its words, or the number of its call


class PieceOrder:
    """`add()` and `rest()` give pieces block by block. The index of a call becomes its number, from 0.

    `called`: whether there was a call.
    """

    def __init__(self) -> None:
        self._open: Key | None = None
        self._arguments: list[str] = []  # of the open call
        self._held: list[Content] = []
        self._numbers: dict[int, int] = {}  # index → number of the call that has it now
        self._ids: list[str] = []  # by number
        self._begun: set[int] = set()

    @property
    def called(self) -> bool:
        return bool(self._ids)

    def add(self, piece: Content) -> Iterable[Content]:
        piece = self._numbered(piece)
        key = key_of(piece)
        if key == self._open:
            return self._pass(piece)
        if key in self._begun:
            return ()  # spaces after the end of its arguments
        if self._held or (isinstance(self._open, int) and not is_json("".join(self._arguments))):
            self._held.append(piece)
            return ()
        return self._pass(piece)

    def rest(self) -> Iterator[Content]:
        """What was held, at the end of the stream."""
        blocks: dict[Key, list[Content]] = {}
        for piece in self._held:
            blocks.setdefault(key_of(piece), []).append(piece)
        self._held = []
        for pieces in blocks.values():
            yield from pieces

    def _pass(self, piece: Content) -> tuple[Content]:
        key = key_of(piece)
        if key != self._open:
            self._open, self._arguments = key, []
        if isinstance(piece, ToolCallPiece):
            self._arguments.append(piece.arguments)
            self._begun.add(piece.index)
        return (piece,)

    def _numbered(self, piece: Content) -> Content:
        """Some servers give each call the index 0: another id with a name begins another call."""
        if not isinstance(piece, ToolCallPiece):
            return piece
        number = self._numbers.get(piece.index)
        if number is None or (piece.name and piece.id and piece.id != self._ids[number]):
            number = self._numbers[piece.index] = len(self._ids)
            self._ids.append(piece.id)
        return replace(piece, index=number)


def key_of(piece: Content) -> Key:
    if isinstance(piece, ToolCallPiece):
        return piece.index
    return "text" if isinstance(piece, Text) else "reasoning"


def is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True
