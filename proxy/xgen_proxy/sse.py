"""Server-sent events as the backends send them: `data: {json}` and a blank line each, and `data: [DONE]` at the end.

https://html.spec.whatwg.org/multipage/server-sent-events.html

The functions below search the bytes of complete events instead of parsing them. That is safe because JSON escapes
quotes and newlines inside a string: nothing that a model writes can look like a field or a line of its own. The bytes
of vLLM, llama-server and llama-cpp-python are tested against them; EventNormaliser turns any other server's events into
the same form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import orjson

from xgen_proxy.errors import UpstreamOversizedError, UpstreamProtocolError

DONE = b"data: [DONE]\n\n"
ROLE = re.compile(rb'"delta": ?\{"role": ?"assistant"(?:, ?"content": ?(?:""|null))?\}')
MAX_EVENT = 8 * 1024 * 1024  # bytes; an event that never ends must not fill the memory
LINE_COST = 64  # bytes that a line of an event counts beyond its own, since each is an object
MAX_LINES = 20_000  # in one read, of at most 256 KiB: each costs 1 µs, and an event has some 200 bytes
ENDS = (b"\n\n", b"\r\n\r\n")
BOM = b"\xef\xbb\xbf"
TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
REASONING = b'"reasoning_content":', b'"reasoning":'  # llama-server's name, and vLLM's


class EventSplitter:
    """Cuts a byte stream at the end of events. A read that ends with an event, as nearly all do, is not copied.

    `passes_unparsed`: complete events come out as the bytes that went in.
    """

    __slots__ = ("pending",)
    passes_unparsed: ClassVar[bool] = True

    def __init__(self) -> None:
        self.pending = bytearray()  # the beginning of an event whose end has not arrived

    def feed(self, data: bytes) -> bytes:
        """Return the events that are complete now, b"" if none. Raises UpstreamOversizedError."""
        if not self.pending:
            if data.endswith(ENDS):
                return data
            end = _last_end(data, 0)
            self.pending += data[end:]
            block = data[:end]
        else:
            searched = max(len(self.pending) - 3, 0)  # what came before was searched when it came
            self.pending += data
            end = _last_end(self.pending, searched)
            block = bytes(self.pending[:end])
            del self.pending[:end]
        if len(self.pending) > MAX_EVENT:
            raise UpstreamOversizedError(f"an event of more than {MAX_EVENT} bytes")
        return block


def _last_end(data: bytes | bytearray, start: int) -> int:
    """Where the last complete event ends; 0 if none ends after `start`."""
    return max((at + len(end) for end in ENDS if (at := data.rfind(end, start)) >= 0), default=0)


class EventNormaliser(EventSplitter):
    """Reads the events of any server as the specification has them, and writes them as `data: {json}` and a blank line.

    Lines end with CR, LF or CRLF; the space after the colon is optional; an event may have several lines of data; a BOM
    and unknown fields are ignored. Each event that comes out is a chunk, `[DONE]`, a comment, or `{"error": …}`. The
    last stands for everything that ends a good stream: an error in any place of the chunk, `event: error`, a choice
    that finished with "error" or "abort", and an event that is no chunk.
    """

    __slots__ = ("_after_cr", "_began", "_data", "_done", "_error", "_size", "_type")
    passes_unparsed = False

    def __init__(self) -> None:
        super().__init__()  # `pending` is the beginning of a line
        self._after_cr = False  # the last read ended with CR, so that LF at the start of the next belongs to it
        self._began = False
        self._done = False
        self._forget_event()

    def _forget_event(self) -> None:
        self._data: list[bytes] = []
        self._size = 0
        self._type = b""
        self._error: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """Return the events that are complete now. Raises UpstreamProtocolError, UpstreamOversizedError."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if not data:
            return b""
        if data.count(b"\n") + data.count(b"\r") > MAX_LINES:
            raise UpstreamProtocolError(f"more than {MAX_LINES} lines in {len(data)} bytes")
        self._after_cr = data.endswith(b"\r")
        first, *lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self.pending += first
        out = []
        if lines:
            rest = lines.pop()
            out = [self._read_line(line) for line in (bytes(self.pending), *lines)]
            self.pending = bytearray(rest)
        self._limit(len(self.pending))
        return b"".join(out)

    def _limit(self, more: int) -> None:
        if self._size + more > MAX_EVENT:
            raise UpstreamOversizedError(f"an event of more than {MAX_EVENT} bytes")

    def _read_line(self, line: bytes) -> bytes:
        """The event or comment that ends with this line."""
        self._limit(len(line))
        if not self._began:
            self._began = True
            line = line.removeprefix(BOM)
        if not line:
            event = b"" if self._done else self._event()
            self._forget_event()
            return event
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not field:
            return b": %b\n\n" % value
        if field == b"data":
            self._data.append(value)
            self._size += len(value) + LINE_COST
        elif field == b"event":
            self._type = value
        elif field == b"error":
            self._error = value
        return b""

    def _event(self) -> bytes:
        data = b"\n".join(self._data)
        if self._error is not None or self._type == b"error":
            return _failed(self._error or data)
        if not data:
            return b""
        if data.strip() == b"[DONE]":
            self._done = True
            return DONE
        try:
            return self._chunk(orjson.loads(data))
        except (orjson.JSONDecodeError, orjson.JSONEncodeError, UpstreamProtocolError) as error:
            return _failed(f"an event that is no chunk: {error}".encode())

    def _chunk(self, chunk: Any) -> bytes:
        """Raises UpstreamProtocolError, and JSONEncodeError if it is nested too deeply."""
        if chunk is None:
            return b""
        if isinstance(chunk, dict):
            if chunk.get("error"):
                return encode({"error": chunk["error"]})
            if chunk.get("choices") is None and isinstance(chunk.get("usage"), dict):
                chunk["choices"] = []
            if "choices" not in chunk and self._type not in (b"", b"message"):
                return b""  # an event of another kind, such as a ping
        check_chunk(chunk)
        for choice in chunk["choices"]:
            if choice.get("finish_reason") in ("error", "abort"):
                return _failed(b"finish_reason " + choice["finish_reason"].encode())
            if choice.get("finish_reason") == "":  # some servers' null
                choice["finish_reason"] = None
        return encode(chunk)


def _failed(reason: bytes) -> bytes:
    """An error event. `reason` is an error object as JSON, or text."""
    try:
        error = orjson.loads(reason)
    except orjson.JSONDecodeError:
        error = {"message": reason.decode("utf-8", "replace")}
    if isinstance(error, dict) and error.get("error"):
        error = error["error"]
    return encode({"error": error or {"message": "no reason given"}})


# Truthy if these are complete events, each a chunk of one choice that has not finished. If so, there is no error, no
# end, no usage and no other line among them. A pattern is the cheapest check that sees every line. Its groups are
# atomic, so that a line is never tried in two ways.
are_unfinished_chunks = re.compile(rb'(?>data: [^\n]*"finish_reason":null[^\n]*\n\n)+').fullmatch


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
    return b'"abort"' in block and (b'"finish_reason":"abort"' in block or b'"finish_reason": "abort"' in block)


def one_reasoning_name(block: bytes) -> bytes:
    """Events or a whole response in which reasoning has the name that vLLM gives it.

    vLLM's streams need no look at each chunk then. A server that sends both names sends the same text twice.
    """
    if REASONING[0] in block and REASONING[1] not in block:
        return block.replace(*REASONING)
    return block


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
    """An SSE comment. Clients ignore it; it shows in the raw stream."""
    return b": " + text.encode("ascii", "replace").replace(b"\n", b" ") + b"\n\n"


def encode(data: Any) -> bytes:
    """An event with `data` as JSON. Raises UpstreamProtocolError if it is nested deeper than can be written."""
    try:
        return b"data: " + orjson.dumps(data) + b"\n\n"
    except orjson.JSONEncodeError as error:  # what was read may have 1024 levels, what is written 254
        raise UpstreamProtocolError(f"an event that cannot be written: {error}") from None


def named_event(name: str, data: bytes) -> bytes:
    """An event as Anthropic's API and the Responses API send it. `data` is JSON."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def parse_chunks(block: bytes) -> Iterator[dict[str, Any]]:
    """The chunks in these events, each checked. Raises UpstreamProtocolError.

    Skips `[DONE]`, and the null with which llama-server begins a stream for several prompts.
    """
    for data in payloads(block):
        if data in (b"[DONE]", b"null"):
            continue
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise UpstreamProtocolError(f"an event that is not JSON: {error}") from None
        check_chunk(chunk)
        yield chunk


def check_chunk(chunk: Any) -> None:
    """Everything that the proxy reads of a chunk has the type that OpenAI's API gives it; else UpstreamProtocolError.

    Fills in what may be missing: a choice's index, and an object in place of null.
    """
    _expect(isinstance(chunk, dict) and isinstance(chunk.get("choices"), list), "choices")
    usage = chunk.get("usage")
    if usage is not None:
        _expect(isinstance(usage, dict) and all(isinstance(usage.get(name) or 0, int) for name in COUNTS), "usage")
    for choice in chunk["choices"]:
        _expect(isinstance(choice, dict), "choices")
        _expect(type(choice.setdefault("index", 0)) is int, "index")
        _expect(isinstance(choice.get("finish_reason"), str | None), "finish_reason")
        if "text" in choice:
            _expect(isinstance(choice["text"], str | None), "text")
            choice["text"] = choice["text"] or ""
        if "delta" in choice:
            choice["delta"] = _object(choice, "delta")
            _check_delta(choice["delta"])
        if choice.get("logprobs"):
            _check_logprobs(choice["logprobs"])


def _expect(well_formed: bool, name: str) -> None:
    if not well_formed:
        raise UpstreamProtocolError(f"an event with malformed {name}")


def _object(holder: dict[str, Any], name: str) -> dict[str, Any]:
    """An object that may be null."""
    value = holder.get(name)
    _expect(isinstance(value, dict | None), name)
    return value or {}


def _check_delta(delta: dict[str, Any]) -> None:
    for name in TEXTS:
        _expect(isinstance(delta.get(name), str | None), name)
    if delta.get("function_call") is not None:
        _check_function(delta["function_call"])
    calls = delta.get("tool_calls")
    if calls is not None:
        _expect(isinstance(calls, list) and all(isinstance(call, dict) for call in calls), "tool_calls")
        for call in calls:
            _expect(type(call.setdefault("index", 0)) is int, "tool_calls")
            call["function"] = _object(call, "function")
            _check_function(call["function"])


def _check_function(function: Any) -> None:
    _expect(isinstance(function, dict), "function")
    for name in ("name", "arguments"):
        _expect(isinstance(function.get(name), str | None), f"function {name}")


def _check_logprobs(logprobs: Any) -> None:
    _expect(isinstance(logprobs, dict), "logprobs")
    tokens = logprobs.get("content")
    _expect(isinstance(tokens, list | None), "logprobs")
    for token in tokens or ():
        _expect(isinstance(token, dict) and isinstance(token.get("top_logprobs") or [], list), "logprobs")
        for each in (token, *(token.get("top_logprobs") or ())):
            _expect(isinstance(each, dict) and isinstance(each.get("token"), str) and "logprob" in each, "logprobs")
