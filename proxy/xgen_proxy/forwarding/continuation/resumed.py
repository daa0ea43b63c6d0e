"""Turns the events of the resuming stream into events of the stream that broke."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from xgen_proxy import sse
from xgen_proxy.dialects.backend_request import Post
from xgen_proxy.dialects.stream_editors import StreamEditor
from xgen_proxy.errors import DifferentAnswerError
from xgen_proxy.forwarding.continuation.sent import REASONING, SentPrefix, outputs
from xgen_proxy.request.features import Features, Json

DETAILS = ("prompt_tokens_details", "completion_tokens_details")
Way = Literal["continue", "relabel", "repeat", "usage"]


class ResumedStream:
    """A stream editor: the id and shape of the broken stream, no second role, and nothing that was already sent.

    `spent`: tokens sent before. `in_prompt`: how many of them the engine counts as part of its prompt, if not all.
    `way`: what the engine does.
    - continue: it goes on after what was sent.
    - relabel: it goes on with the text and calls it reasoning.
    - repeat: it gives the answer anew from its beginning. What was sent of its text, but for white space at the end,
      must come again and is not sent again. Reasoning is dropped if the client has some, since it would not fit
      together, or has text, which it would follow.
    - usage: it only counts the prompt, since the answer is complete.
    """

    def __init__(
        self, prefix: SentPrefix, spent: int, features: Features, way: Way = "continue", in_prompt: int | None = None
    ) -> None:
        repeats = way == "repeat"
        self._head = prefix.head
        self._prefix = prefix
        self._role_sent = bool(prefix.head)
        self._chat = features.endpoint == "chat"
        self._include_usage = features.include_usage
        self._blank = "" if repeats and not prefix.text else prefix.blank
        self._to_come = prefix.partial if repeats else ""  # of what the client has already
        self._drops_reasoning = repeats and bool(prefix.reasoning or prefix.text)
        self._way = way
        self._spent = 0 if repeats else spent
        self.usage_only = way == "usage"
        self._in_prompt = 0 if self.usage_only else self._spent if in_prompt is None else in_prompt
        self.began = False  # its first output was as expected
        self._inner: StreamEditor | None = None
        self._usage: Json | None = None

    def after(self, inner: StreamEditor | None) -> ResumedStream:
        """`inner` repairs the backend's own events first."""
        self._inner = inner
        return self

    def check(self, block: bytes) -> bool:
        """Whether these events, all so far, have output. vLLM sends chunks without any while it holds back what may
        begin a stop string.

        Raises DifferentAnswerError if the output is of the wrong kind: reasoning must go on as reasoning, text as text.
        An engine that does not know that it is reasoning is found out here, before anything is sent.
        """
        repeats = self._way == "repeat"
        if self._way in ("usage", "relabel") or not self._chat or (repeats and not self._prefix.reasoning):
            return True
        expected = repeats or self._prefix.in_reasoning
        for chunk in sse.parse_chunks(block):
            for choice in chunk["choices"]:
                for kind, _ in outputs(choice):
                    if expected != (kind == "reasoning"):
                        raise DifferentAnswerError(f"goes on with {kind}, not as the answer so far")
                    return True
                if choice.get("finish_reason"):
                    return True
        return False

    @property
    def done(self) -> bool:
        return self._inner is not None and self._inner.done

    def edit(self, block: bytes) -> bytes:
        """Raises UpstreamProtocolError, and DifferentAnswerError if the answer does not come again."""
        block = self._inner.edit(block) if self._inner else block
        return b"".join(part for chunk in sse.parse_chunks(block) for part in self._parts(chunk))

    def _parts(self, chunk: Json) -> Iterator[bytes]:
        self._usage = chunk.get("usage") or self._usage
        if not self._head:
            self._head = {name: value for name, value in chunk.items() if name not in ("choices", "usage")}
        for choice in () if self.usage_only else chunk["choices"]:
            output = self._text(choice) if "text" in choice else self._delta(choice.get("delta") or {})
            finish = choice.get("finish_reason")
            if finish and self._to_come:
                raise DifferentAnswerError("the new answer is shorter than what was sent")
            if output or finish:
                yield self.event(output, finish, choice.get("stop_reason"))

    def _text(self, choice: Json) -> Json:
        text = self._unsent(choice["text"])
        return {"text": text} if text else {}

    def _delta(self, delta: Json) -> Json:
        """What the client is to get of a delta."""
        reasoning = next((delta[name] for name in REASONING if delta.get(name)), "")
        text = delta.get("content") or ""
        if self._way == "relabel":
            reasoning, text = "", reasoning + text
        content = self._unsent(text)
        kept: Json = {}
        if reasoning and not self._drops_reasoning:
            if self._prefix.text and self._way != "repeat":
                raise DifferentAnswerError("reasoning after the text")
            kept["reasoning"] = self._without_sent_spaces(reasoning)
        if content:
            kept["content"] = content
        for name in ("tool_calls", "function_call"):
            if delta.get(name):
                if self._to_come:
                    raise DifferentAnswerError("a tool call before the text that was sent")
                kept[name] = delta[name]
        return {name: value for name, value in kept.items() if value}

    def _unsent(self, text: str) -> str:
        """The part of the text that the client does not have."""
        if not self._to_come:
            return self._without_sent_spaces(text)
        both = min(len(text), len(self._to_come))
        if text[:both] != self._to_come[:both]:
            raise DifferentAnswerError("the new answer begins differently from what was sent")
        self._to_come = self._to_come[both:]
        return self._without_sent_spaces(text[both:])

    def _without_sent_spaces(self, text: str) -> str:
        """The text without those spaces at its start that the client already has."""
        while self._blank and text:
            if text[0] != self._blank[0]:
                self._blank = ""
            else:
                text, self._blank = text[1:], self._blank[1:]
        return text

    def event(self, output: Json, finish: str | None, stop: str | int | None = None) -> bytes:
        """A chunk. `output`: a delta of a chat, or {text} of a completion. `stop`: vLLM's stop_reason."""
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {} if stop is None else {"stop_reason": stop}
        if self._chat:
            role = {} if self._role_sent else {"role": "assistant"}
            choice["delta"] = {**role, **({"content": output["text"]} if "text" in output else output)}
            self._role_sent = True
        else:
            choice["text"] = output.get("text") or output.get("content") or ""
        return sse.encode({**self._head, "choices": [choice]})

    async def finish(self, post: Post) -> bytes:
        """The usage of the whole answer: the resuming backend counted the sent prefix as part of its prompt."""
        for chunk in sse.parse_chunks(await self._inner.finish(post) if self._inner else b""):
            self._usage = chunk.get("usage") or self._usage
        if self._usage is None or not self._include_usage:
            return b""
        prompt = max(0, (self._usage.get("prompt_tokens") or 0) - self._in_prompt)
        completion = self._spent + (0 if self.usage_only else self._usage.get("completion_tokens") or 0)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        usage |= self._usage_details(self._usage, prompt)
        return sse.encode({**self._head, "choices": [], "usage": usage})

    def _usage_details(self, usage: Json, prompt: int) -> Json:
        """Those that still hold: all of an answer that was given anew, else what the cache had of the `prompt`."""
        if self._way == "repeat":
            return {name: usage[name] for name in DETAILS if usage.get(name)}
        details = usage.get(DETAILS[0])
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return {DETAILS[0]: {"cached_tokens": min(cached, prompt)}} if type(cached) is int else {}
