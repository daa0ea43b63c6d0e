"""What the client has been sent of a stream, read from its events, and how many tokens that was."""

from __future__ import annotations

from collections.abc import Iterator

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.dialects.dialect import Dialect
from xgen_proxy.dialects.request_rules import LEGACY_COMPLETION_TOKENS
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import Features, Json
from xgen_proxy.values import frozen

HEAD = ("id", "object", "created", "model", "system_fingerprint")
BLANK = " \t\r\n"
# Names of the same text; a server that sends both sends it twice.
REASONING = ("reasoning", "reasoning_content")
KNOWN = {"content", *REASONING, "tool_calls", "function_call"}


@frozen
class SentPrefix:
    """What the client has been sent of a stream.

    `calls`: the names and arguments of its tool calls. `pieces` counts the chunks with output. `head` is empty if
    nothing was sent, not even the role.
    """

    head: Json
    text: str
    pieces: int
    finish: str | None
    usage: bool
    reasoning: str = ""
    calls: str = ""

    @property
    def partial(self) -> str:
        """The text without white space at its end. Tokenizers join a space with the word that follows it, so that a
        model whose prompt ends with a space writes nonsense; and some templates cut off line breaks."""
        return self.text.rstrip(BLANK)

    @property
    def in_reasoning(self) -> bool:
        """The break came while the model reasoned."""
        return bool(self.reasoning) and not self.text

    @property
    def blank(self) -> str:
        """The white space at the end, which the model has not seen and may write again."""
        last = self.reasoning if self.in_reasoning else self.text
        return last[len(last.rstrip(BLANK)) :]

    @property
    def empty(self) -> bool:
        """The client has no output yet, or white space only."""
        return not (self.partial or self.reasoning or self.calls)


def parse_sent_prefix(data: bytes) -> SentPrefix:
    """Raises UpstreamProtocolError if the answer so far cannot be continued."""
    head: Json = {}
    found: dict[str, list[str]] = {"text": [], "reasoning": [], "calls": []}
    pieces = 0
    finish = None
    usage = False
    for chunk in sse.parse_chunks(data):
        head = head or {name: chunk[name] for name in HEAD if name in chunk}
        usage = usage or bool(chunk.get("usage"))
        for choice in chunk["choices"]:
            output = list(outputs(choice))
            for kind, said in output:
                if kind == "reasoning" and found["text"]:
                    raise UpstreamProtocolError("the answer so far has reasoning after its text")
                found[kind].append(said)
            pieces += any(said for _, said in output)
            finish = choice.get("finish_reason") or finish
    if found["calls"] and finish is None:
        raise UpstreamProtocolError("the answer so far has a part of a tool call")
    joined = {kind: "".join(parts) for kind, parts in found.items()}
    return SentPrefix(head, joined["text"], pieces, finish, usage, joined["reasoning"], joined["calls"])


def outputs(choice: Json) -> Iterator[tuple[str, str]]:
    """(kind, what was said) for all output in one chunk's choice, in the order in which the model wrote it. The kind is
    "reasoning", "text" or "calls".

    Raises UpstreamProtocolError for any other output, such as a refusal or audio.
    """
    if choice.get("text"):
        yield "text", choice["text"]
    delta = {name: value for name, value in (choice.get("delta") or {}).items() if value and name != "role"}
    if more := delta.keys() - KNOWN:
        raise UpstreamProtocolError(f"the answer so far has {', '.join(sorted(more))}")
    if reasoning := next((delta[name] for name in REASONING if name in delta), ""):
        yield "reasoning", reasoning
    if delta.get("content"):
        yield "text", delta["content"]
    functions = [call["function"] for call in delta.get("tool_calls") or ()]
    if not functions and "function_call" in delta:  # what came before tool_calls
        functions = [delta["function_call"]]
    for function in functions:
        yield "calls", (function.get("name") or "") + (function.get("arguments") or "")


async def tokens_sent(dialect: Dialect, request: BackendRequest, prefix: SentPrefix, post: Post) -> int:
    """Number of tokens sent so far, as the resuming replica counts them, or one for each chunk if it cannot count.

    Raises UpstreamError.
    """
    sent = prefix.reasoning + prefix.partial + prefix.calls
    if not sent:
        return 0
    counted = await dialect.count_tokens(request, sent, post)
    return prefix.pieces if counted is None else counted


def tokens_left(features: Features, spent: int) -> int | None:
    """Tokens that may still be generated; None if there is no limit."""
    limit = features.max_tokens
    if limit is None:
        limit = LEGACY_COMPLETION_TOKENS if features.endpoint == "completions" else None
    return None if limit is None else limit - spent


def is_complete(prefix: SentPrefix, features: Features) -> bool:
    """Only the closing `[DONE]` is missing."""
    return prefix.finish is not None and (prefix.usage or not features.include_usage)
