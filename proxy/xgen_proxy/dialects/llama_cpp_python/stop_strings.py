"""Cuts a stream at stop strings, in place of llama-cpp-python.

It never sends the tokens that make up a stop string, and does not say whether a stop string or the end of the text
ended an answer, so that its usage could not be counted. Without stop strings it sends every token; the text is cut here
where it would have cut it, and closing the connection ends the generation.
"""

from __future__ import annotations

from collections.abc import Iterator

from xgen_proxy.request.features import Json


def stop_strings(body: Json) -> tuple[str, ...]:
    """What is no text is left out: the request rules refuse it."""
    stop = body.get("stop") or ()
    return tuple(each for each in ([stop] if isinstance(stop, str) else stop) if isinstance(each, str) and each)


class StopStringCutter:
    """Takes the chunks of one choice. `done`: a stop string was found, and everything after it is dropped.

    The number and the length of the strings are limited (request/fields.py).
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.done = False
        self._strings = strings
        self._beginnings = {string[:length] for string in strings for length in range(1, len(string))}
        self._longest = max(map(len, strings), default=1) - 1
        self._held = ""  # the end of the text so far, where a stop string may begin
        self._last: Json = {}

    def cut(self, chunk: Json) -> Iterator[Json]:
        """The chunks to send in its place."""
        if self.done:
            return
        choice = chunk["choices"][0] if chunk["choices"] else {}
        text = text_of(choice)
        if not self._strings or (text is None and not choice.get("finish_reason")):
            yield chunk
        elif choice.get("finish_reason"):
            if self._held:
                yield with_text(self._last, self._held)
            yield chunk
        else:
            self._last = chunk
            yield from self._pass(chunk, self._held + (text or ""))

    def _pass(self, chunk: Json, text: str) -> Iterator[Json]:
        """If several strings are found, the first in the given order decides, as in llama-cpp-python."""
        found = next((string for string in self._strings if string in text), None)
        if found is not None:
            self.done = True
            yield with_text(chunk, text[: text.index(found)])
            yield finished(chunk)
            return
        self._held = text[len(text) - self._partial_match(text) :]
        passed = text[: len(text) - len(self._held)]
        if passed or not text:
            yield with_text(chunk, passed)

    def _partial_match(self, text: str) -> int:
        """Number of characters at the end of `text` that may begin a stop string."""
        lengths = range(min(self._longest, len(text)), 0, -1)
        return next((length for length in lengths if text[-length:] in self._beginnings), 0)


def text_of(choice: Json) -> str | None:
    """The text or tool-call arguments in a choice; None if it has neither."""
    if "text" in choice:
        text: str = choice["text"]
        return text
    delta = choice.get("delta") or {}
    if delta.get("tool_calls"):
        arguments: str = delta["tool_calls"][0]["function"].get("arguments") or ""
        return arguments
    content: str | None = delta.get("content")
    return content


def with_text(chunk: Json, text: str) -> Json:
    """A copy of a chunk with `text` in place of its own."""
    choice = dict(chunk["choices"][0])
    if "text" in choice:
        choice["text"] = text
    elif choice["delta"].get("tool_calls"):
        choice["delta"] = _with_arguments(choice["delta"], text)
    else:
        choice["delta"] = {**choice["delta"], "content": text}
    return {**chunk, "choices": [choice]}


def _with_arguments(delta: Json, text: str) -> Json:
    call = delta["tool_calls"][0]
    delta = {**delta, "tool_calls": [{**call, "function": {**call["function"], "arguments": text}}]}
    if delta.get("function_call"):
        delta["function_call"] = {**delta["function_call"], "arguments": text}
    return delta


def finished(chunk: Json) -> Json:
    """The closing chunk that llama-cpp-python would send after this one."""
    choice = dict(chunk["choices"][0])
    calls = "delta" in choice and choice["delta"].get("tool_calls")
    ending: Json = {"delta": {}} if "delta" in choice else {"text": ""}
    ending["finish_reason"] = "tool_calls" if calls else "stop"
    return {**chunk, "choices": [{**choice, **ending, "logprobs": None}]}
