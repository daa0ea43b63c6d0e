"""Counts the usage of a llama-cpp-python stream, which never reports any, with the replica's help."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

from xgen_proxy.dialects.backend_request import BackendRequest, Post
from xgen_proxy.dialects.llama_cpp_python.request_rewrites import TOOL_FIELDS
from xgen_proxy.dialects.llama_cpp_python.stop_strings import text_of
from xgen_proxy.errors import UpstreamProtocolError
from xgen_proxy.request.features import Json

WORD = " word"  # whatever comes before, tokenizers begin anew at a space and a letter
REPORTED = re.compile(r"\((\d{1,9}) in the messages")


class TokenCounter:
    """`add()` it each chunk of the stream, before anything is cut from it; then ask for the `usage()`.

    Completion tokens: the server sends a chunk for each token, but holds tokens back until their bytes are complete
    characters. So a chunk of ASCII is one token, and stretches of other text are tokenized by the replica. The count is
    exact unless the model wrote a character with other tokens than the tokenizer would, and then mostly off by one. It
    may exceed max_tokens, as the replica's own count does: it never stops within a character.

    Prompt tokens: for a completion, the tokenizer's count. Only the replica knows a chat's template. It refuses a chat
    that is too long, with the count, before it touches the cache; two refusals, the second with twice the padding, give
    the count without padding (25 ms with 4,096 words). If that fails, the same request is sent again for one token:
    exact, but the cache loses the answer, and the chat's next turn waits 1.6 s longer for its first token (200 tokens
    of answer, 135 M parameters, one core).

    `prepared` gives the body of the request as the engine gets it.
    """

    def __init__(self, request: BackendRequest, prepared: Callable[[BackendRequest], Json]) -> None:
        self.request = request
        self.texts: list[str] = []
        self._prepared = prepared

    def add(self, chunk: Json) -> None:
        for choice in chunk["choices"]:
            text = text_of(choice)
            if text is not None and not choice.get("finish_reason"):
                self.texts.append(text)

    async def usage(self, post: Post) -> Json:
        """Raises UpstreamError."""
        prompt = await self._prompt_tokens(post)
        completion = await self._completion_tokens(post)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def _prompt_tokens(self, post: Post) -> int:
        body = self._prepared(self.request)
        if "prompt" in body:
            return await count_tokens(body["prompt"], post)
        kept = {key: body[key] for key in ("model", "messages", *TOOL_FIELDS) if key in body}
        ask = {**kept, "max_tokens": 1}
        return await self._prompt_tokens_by_refusal(ask, post) or await self._prompt_tokens_by_request(ask, post)

    async def _prompt_tokens_by_refusal(self, ask: Json, post: Post) -> int | None:
        """From two refusals of a padded chat. None if the padding would merge with the text, or if the replica does not
        answer as expected."""
        words = self.request.context
        text = ask["messages"][-1]["content"]
        if not words or not text or text[-1].isspace():
            return None
        counts = []
        for times in (1, 2):
            last = {**ask["messages"][-1], "content": text + WORD * words * times}
            status, answer = await post(self.request.path, {**ask, "messages": [*ask["messages"][:-1], last]})
            reported = REPORTED.search(str(answer)) if status == 400 else None
            if reported is None:
                return None
            counts.append(int(reported[1]))
        once, twice = counts
        return 2 * once - twice if (twice - once) % words == 0 else None

    async def _prompt_tokens_by_request(self, ask: Json, post: Post) -> int:
        status, answer = await post(self.request.path, ask)
        if status != 200:
            raise UpstreamProtocolError(f"counting the prompt's tokens: {status}")
        return _number(answer, "usage", "prompt_tokens")

    async def _completion_tokens(self, post: Post) -> int:
        if "logprobs" in self.request.features.needs:  # then it sends each token alone
            return len(self.texts)
        if "forced_tool" in self.request.features.needs and self.texts and self.texts[-1] == "":
            self.texts.pop()  # its closing chunk comes twice
        tokens = 0
        for ascii, group in groupby(self.texts, str.isascii):
            texts = list(group)
            tokens += len(texts) if ascii else await self._tokens("".join(texts), len(texts), post)
        return tokens

    async def _tokens(self, text: str, chunks: int, post: Post) -> int:
        """Never fewer than `chunks`, and without what the tokenizer puts before any text."""
        return max(chunks, await count_tokens(text, post) - await count_tokens("", post))


async def count_tokens(text: str, post: Post) -> int:
    """Includes what the tokenizer puts before any text. Raises UpstreamError."""
    status, answer = await post("/extras/tokenize/count", {"input": text})
    if status != 200:
        raise UpstreamProtocolError(f"/extras/tokenize/count says {status}")
    return _number(answer, "count")


def _number(answer: Any, *path: str) -> int:
    """Raises UpstreamProtocolError if there is none."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, dict) else None
    if type(answer) is not int:
        raise UpstreamProtocolError(f"an answer without {'.'.join(path)}")
    return answer
