"""A stream of pieces of a chat as the events of a response.

https://platform.openai.com/docs/api-reference/responses-streaming

One item is open at a time: what the model thinks, what it says, or one call. A piece of another kind closes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import orjson

from xgen_proxy import sse
from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import Failure, Finish, Piece, Reasoning, Text, ToolCallPiece, Usage
from xgen_proxy.translation.piece_order import Content, PieceOrder
from xgen_proxy.translation.responses.errors import failure
from xgen_proxy.translation.responses.logprobs import output_logprobs
from xgen_proxy.translation.responses.response import (
    ResponseHead,
    Status,
    message_item,
    reasoning_item,
    reasoning_part,
    text_part,
    why_incomplete,
)
from xgen_proxy.translation.responses.tools import InputDecoder, Tool, Tools, call_item, decode_input

Event = tuple[str, Json]  # its type without `response.`, and its fields


class ResponseStream:
    """Implements StreamTranslation."""

    def __init__(self, head: ResponseHead, tools: Tools) -> None:
        self._head = head
        self._tools = tools
        self._events = 0
        self._output: list[Json] = []
        self._open: OpenItem | None = None
        self._order = PieceOrder()
        self._call = -1  # the number of the last call
        self._text: list[Text] = []  # white space that may be the beginning of a text
        self._finish = Finish("stop")
        self._usage: Usage | None = None

    def ping(self) -> bytes:
        """An event rather than a comment: Codex's clock of 300 s runs on through comments."""
        return self._begin() or self._event("in_progress", {"response": self._head.response("in_progress")})

    def feed(self, piece: Piece) -> bytes:
        events = self._begin()
        if isinstance(piece, Content):
            return events + b"".join(map(self._content, self._order.add(piece)))
        if isinstance(piece, Failure):
            response = self._head.response("failed", self._output, usage=self._usage, error=failure(piece.error))
            return events + self._event("failed", {"response": response})
        if isinstance(piece, Finish):
            self._finish = piece
        else:
            self._usage = piece
        return events

    def end(self) -> bytes:
        events = self._begin() + b"".join(map(self._content, self._order.rest()))
        if not self._output and self._open is None:
            events += self._send_text()
        reason = why_incomplete(self._finish)
        status: Status = "incomplete" if reason else "completed"
        events += self._close(status)
        response = self._head.response(status, self._output, usage=self._usage, why_incomplete=reason)
        return events + self._event(status, {"response": response})

    def _begin(self) -> bytes:
        """The first events, once."""
        if self._events:
            return b""
        response = {"response": self._head.response("in_progress")}
        return self._event("created", response) + self._event("in_progress", response)

    def _content(self, piece: Content) -> bytes:
        if isinstance(piece, Text):
            return self._add_text(piece)
        return self._add(ReasoningItem, piece.text) if isinstance(piece, Reasoning) else self._add_call(piece)

    def _add_text(self, piece: Text) -> bytes:
        """Models often write line breaks between their thoughts and a call, which are no message."""
        self._text.append(piece)
        return b"" if piece.text.isspace() and not isinstance(self._open, TextItem) else self._send_text()

    def _send_text(self) -> bytes:
        text = "".join(piece.text for piece in self._text)
        logprobs = tuple(logprob for piece in self._text for logprob in piece.logprobs)
        self._text = []
        return self._add(TextItem, text, logprobs)

    def _add(self, kind: type[WordsItem], words: str, logprobs: tuple[Json, ...] = ()) -> bytes:
        events, item = b"", self._open
        if not isinstance(item, kind):
            events = self._close("completed")
            item = kind(self._item_id(kind.prefix))
            events += self._start(item)
        return events + self._written(item, item.add(words, logprobs))

    def _add_call(self, piece: ToolCallPiece) -> bytes:
        item = self._open
        if piece.index == self._call and isinstance(item, FunctionCallItem):
            return self._written(item, item.add(piece.arguments))
        self._call = piece.index
        self._text = []
        events = self._close("completed")
        tool = self._tools.find(piece.name)
        kind = CustomCallItem if tool.kind == "custom" else FunctionCallItem
        item_id = self._item_id(kind.prefix)
        item = kind(item_id, piece.id or f"call_{item_id}", tool)
        return events + self._start(item) + self._written(item, item.add(piece.arguments))

    def _item_id(self, prefix: str) -> str:
        return self._head.item_id(prefix, len(self._output))

    def _start(self, item: OpenItem) -> bytes:
        added = self._event("output_item.added", {"output_index": len(self._output), "item": item.item("in_progress")})
        self._open = item
        return added + self._written(item, item.open())

    def _close(self, status: str) -> bytes:
        if self._open is None:
            return b""
        events = self._written(self._open, self._open.close())
        done = self._open.item(status)
        events += self._event("output_item.done", {"output_index": len(self._output), "item": done})
        self._output.append(done)
        self._open = None
        return events

    def _written(self, item: OpenItem, events: Iterator[Event]) -> bytes:
        place = {"item_id": item.item_id, "output_index": len(self._output)}
        return b"".join(self._event(kind, {**place, **fields}) for kind, fields in events)

    def _event(self, kind: str, fields: Json) -> bytes:
        name = f"response.{kind}"
        data = orjson.dumps({"type": name, "sequence_number": self._events, **fields})
        self._events += 1
        return sse.named_event(name, data)


class OpenItem(ABC):
    """An item that is being sent. Its methods yield its events, without what all of them have."""

    prefix: ClassVar[str]  # of its id

    def __init__(self, item_id: str) -> None:
        self.item_id = item_id

    @abstractmethod
    def item(self, status: str) -> Json:
        """As output_item.added has it before open(), and as output_item.done has it at the end."""

    def open(self) -> Iterator[Event]:
        yield from ()

    @abstractmethod
    def add(self, words: str, logprobs: tuple[Json, ...] = ()) -> Iterator[Event]: ...

    @abstractmethod
    def close(self) -> Iterator[Event]: ...


class WordsItem(OpenItem):
    """An item with one part, which is words."""

    event: ClassVar[str]

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self.words: list[str] = []
        self.parts: list[Json] = []

    @abstractmethod
    def part(self) -> Json: ...

    def open(self) -> Iterator[Event]:
        yield "content_part.added", {"content_index": 0, "part": self.part()}

    def add(self, words: str, logprobs: tuple[Json, ...] = ()) -> Iterator[Event]:
        self.words.append(words)
        if words:
            yield f"{self.event}.delta", {"content_index": 0, "delta": words}

    def close(self) -> Iterator[Event]:
        part = self.part()
        self.parts = [part]
        extra = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield f"{self.event}.done", {"content_index": 0, "text": part["text"], **extra}
        yield "content_part.done", {"content_index": 0, "part": part}


class TextItem(WordsItem):
    """What the assistant says."""

    prefix = "msg"
    event = "output_text"

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self.logprobs: list[Json] = []

    def part(self) -> Json:
        return text_part("".join(self.words), self.logprobs)

    def item(self, status: str) -> Json:
        return message_item(self.item_id, status, self.parts)

    def add(self, words: str, logprobs: tuple[Json, ...] = ()) -> Iterator[Event]:
        found = output_logprobs(logprobs)
        self.logprobs += found
        for kind, fields in super().add(words):
            yield kind, {**fields, "logprobs": found}


class ReasoningItem(WordsItem):
    """What it thinks before."""

    prefix = "rs"
    event = "reasoning_text"

    def part(self) -> Json:
        return reasoning_part("".join(self.words))

    def item(self, status: str) -> Json:
        return reasoning_item(self.item_id, status, self.parts)


class FunctionCallItem(OpenItem):
    """A call of a function: its arguments pass as they come."""

    prefix = "fc"

    def __init__(self, item_id: str, call_id: str, tool: Tool) -> None:
        super().__init__(item_id)
        self.call_id = call_id
        self.tool = tool
        self.sent: list[str] = []

    def item(self, status: str) -> Json:
        return call_item(self.tool, self.item_id, self.call_id, "".join(self.sent), status)

    def add(self, words: str, logprobs: tuple[Json, ...] = ()) -> Iterator[Event]:
        self.sent.append(words)
        if words:
            yield "function_call_arguments.delta", {"delta": words}

    def close(self) -> Iterator[Event]:
        if not any(self.sent):
            yield from self.add("{}")  # clients parse it
        yield "function_call_arguments.done", {"arguments": "".join(self.sent)}


class CustomCallItem(FunctionCallItem):
    """A call of a custom tool: the text inside the arguments passes as it comes."""

    prefix = "ctc"

    def __init__(self, item_id: str, call_id: str, tool: Tool) -> None:
        super().__init__(item_id, call_id, tool)
        self.arguments: list[str] = []
        self.decoder = InputDecoder()

    def add(self, words: str, logprobs: tuple[Json, ...] = ()) -> Iterator[Event]:
        self.arguments.append(words)
        if text := self.decoder.feed(words):
            self.sent.append(text)
            yield "custom_tool_call_input.delta", {"delta": text}

    def close(self) -> Iterator[Event]:
        """If the arguments turn out to be malformed after a part of the text was sent, the rest follows as it is."""
        arguments, sent = "".join(self.arguments), "".join(self.sent)
        text = decode_input(arguments)
        if rest := text[len(sent) :] if text.startswith(sent) else arguments[self.decoder.read :]:
            self.sent.append(rest)
            yield "custom_tool_call_input.delta", {"delta": rest}
        yield "custom_tool_call_input.done", {"input": sent + rest}
