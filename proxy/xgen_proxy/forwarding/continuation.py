"""Continues the text of a broken stream from its next character. No I/O of its own.

    events sent so far ──▶ SentPrefix: text, id, created, finish        may it be resumed?  why_not_resumable()
    SentPrefix + dialect ──▶ another request, whose prompt ends with that text        resumed_request()
    its events ──▶ events of the stream that broke        ResumedStream

How an engine continues a chat is its dialect's business: `Dialect.resume_chat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.llama_cpp_python.chat_template import ChatTemplate
from xgen_proxy.dialects.request_rules import LEGACY_COMPLETION_TOKENS
from xgen_proxy.dialects.stream_editors import StreamEditor
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import Features, Json
from xgen_proxy.values import frozen

# All other needs of a request constrain later tokens by earlier ones, so that plain text could not be resumed rightly.
RESUMABLE_NEEDS = frozenset({"generation", "images"})
PREFILLED = ("continue_final_message", "add_generation_prompt")
HEAD = ("id", "object", "created", "model", "system_fingerprint")
BLANK = " \t"


@frozen
class SentPrefix:
    """What the client has been sent of a stream. `pieces` counts the chunks with text."""

    head: Json
    text: str
    pieces: int
    finish: str | None
    usage: bool

    @property
    def partial(self) -> str:
        """The text without trailing spaces: tokenizers join a space with the word that follows it, so that a model
        whose prompt ends with a space writes nonsense."""
        return self.text.rstrip(BLANK)

    @property
    def blank(self) -> str:
        return self.text[len(self.partial) :]


def why_not_resumable(features: Features, body: Json) -> str | None:
    """Why a stream for this request must not be resumed, or None if it may be."""
    if not features.continuation:
        return "the client opted out"
    needs = features.needs - RESUMABLE_NEEDS
    if needs:
        return f"an answer with {', '.join(sorted(needs))} cannot be resumed"
    if features.endpoint == "chat" and body["messages"][-1].get("role") == "assistant":
        return "the answer began with the client's own words"
    if any(body.get(field) is not None for field in PREFILLED):
        return "the client sets how the prompt ends"
    return None


def parse_sent_prefix(data: bytes) -> SentPrefix:
    """Raises UpstreamProtocolError if anything but plain text was sent."""
    head: Json = {}
    texts: list[str] = []
    finish = None
    usage = False
    for chunk in sse.parse_chunks(data):
        head = head or {name: chunk[name] for name in HEAD if name in chunk}
        usage = usage or bool(chunk.get("usage"))
        for choice in chunk["choices"]:
            texts.append(_text(choice))
            finish = choice.get("finish_reason") or finish
    return SentPrefix(head, "".join(texts), sum(map(bool, texts)), finish, usage)


def _text(choice: Json) -> str:
    """Raises UpstreamProtocolError for reasoning and tool calls: neither can be put into a prompt as text."""
    if "text" in choice:
        return choice["text"] or ""
    delta = dict(choice.get("delta") or {})
    delta.pop("role", None)
    text: str = delta.pop("content", None) or ""
    more = [name for name, value in delta.items() if value]
    if more:
        raise UpstreamProtocolError(f"the answer so far has {', '.join(sorted(more))}")
    return text


async def tokens_sent(dialect: Dialect, request: BackendRequest, prefix: SentPrefix, post: Post) -> int:
    """Number of tokens sent so far, as the resuming replica counts them, or one for each chunk if it cannot count.

    Raises UpstreamError.
    """
    if not prefix.partial:
        return 0
    counted = await dialect.count_tokens(request, prefix.partial, post)
    return prefix.pieces if counted is None else counted


def tokens_left(features: Features, spent: int) -> int | None:
    """Tokens that may still be generated; None if there is no limit."""
    limit = features.max_tokens
    if limit is None:
        limit = LEGACY_COMPLETION_TOKENS if features.endpoint == "completions" else None
    return None if limit is None else limit - spent


def resumed_request(
    dialect: Dialect, request: BackendRequest, prefix: SentPrefix, left: int | None, template: ChatTemplate | None
) -> BackendRequest:
    """The request that continues the sent prefix with at most `left` tokens.

    If `left` is 0 and only the usage is still to be sent, one token is generated and dropped.
    Raises UpstreamProtocolError if the chat template fails.
    """
    body, features = dict(request.body), request.features
    if left is not None:
        body["max_tokens"] = max(left, 1)
        body.pop("max_completion_tokens", None)
        features = replace(features, max_tokens=body["max_tokens"])
    if body.get("min_tokens"):
        body["min_tokens"] = max(0, body["min_tokens"] - prefix.pieces)
    if features.endpoint == "completions":
        prompt = body["prompt"]
        body["prompt"] = (prompt[0] if isinstance(prompt, list) else prompt) + prefix.partial
    request = replace(request, features=features, body=body, raw=None)
    if features.endpoint == "completions" or not prefix.partial:
        return request
    return dialect.resume_chat(request, prefix.partial, template)


class ResumedStream:
    """A stream editor that turns the events of the resuming stream into events of the broken one: its id and shape, no
    second role, and no spaces that were already sent.

    `spent`: tokens sent before. `usage_only`: the answer is complete and only its usage is wanted.
    """

    def __init__(self, prefix: SentPrefix, spent: int, features: Features, *, usage_only: bool) -> None:
        self._head = prefix.head
        self._chat = features.endpoint == "chat"
        self._include_usage = features.include_usage
        self._blank = prefix.blank
        self._spent = spent
        self._usage_only = usage_only
        self._inner: StreamEditor | None = None
        self._usage: Json | None = None

    def after(self, inner: StreamEditor | None) -> ResumedStream:
        """`inner` repairs the backend's own events first."""
        self._inner = inner
        return self

    @property
    def done(self) -> bool:
        return self._inner is not None and self._inner.done

    def edit(self, block: bytes) -> bytes:
        """Raises UpstreamProtocolError."""
        block = self._inner.edit(block) if self._inner else block
        return b"".join(part for chunk in sse.parse_chunks(block) for part in self._parts(chunk))

    def _parts(self, chunk: Json) -> Iterator[bytes]:
        self._usage = chunk.get("usage") or self._usage
        for choice in () if self._usage_only else chunk["choices"]:
            text = self._without_sent_spaces(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
            if text or choice.get("finish_reason"):
                yield self.event(text, choice.get("finish_reason"))

    def _without_sent_spaces(self, text: str) -> str:
        """The text without those spaces at its start that the client already has."""
        while self._blank and text:
            if text[0] != self._blank[0]:
                self._blank = ""
            else:
                text, self._blank = text[1:], self._blank[1:]
        return text

    def event(self, text: str, finish: str | None) -> bytes:
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return sse.encode({**self._head, "choices": [choice]})

    async def finish(self, post: Post) -> bytes:
        """The usage of the whole answer: the resuming backend counted the sent prefix as part of its prompt."""
        for chunk in sse.parse_chunks(await self._inner.finish(post) if self._inner else b""):
            self._usage = chunk.get("usage") or self._usage
        if self._usage is None or not self._include_usage:
            return b""
        prompt = (self._usage.get("prompt_tokens") or 0) - self._spent
        completion = self._spent + (0 if self._usage_only else self._usage.get("completion_tokens") or 0)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return sse.encode({**self._head, "choices": [], "usage": usage})


def is_complete(prefix: SentPrefix, features: Features) -> bool:
    """Only the closing `[DONE]` is missing."""
    return prefix.finish is not None and (prefix.usage or not features.include_usage)
