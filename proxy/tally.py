"""Usage of a llama-cpp-python stream, which never has any: counted here, with the replica's own tokenizer."""

from __future__ import annotations

from proxy.bodies import prepared
from proxy.dialects import LLAMA_CPP_PYTHON, Json, Post, Request
from proxy.errors import Broken


class Tally:
    """Fed each chunk of the stream.

    Prompt tokens: the same request again, whole and for one token. The prompt is still in the replica's cache, so this
    costs one token. Completion tokens: llama-cpp-python sends a chunk for each token, but holds tokens back until their
    bytes are whole characters; so chunks are counted while the text is ASCII or carries logprobs (then it sends each
    token alone), and otherwise the text is tokenized. Not exact: the tokens of a stop string are missing (they are
    never sent), and a text outside ASCII could have been made of other tokens than the tokenizer's.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.chunks = 0
        self.texts: list[str] = []

    def add(self, chunk: Json) -> None:
        for choice in chunk["choices"]:
            text = _text_of(choice)
            if text and not choice.get("finish_reason"):
                self.chunks += 1
                self.texts.append(text)

    async def usage(self, post: Post) -> Json:
        """Raises UpstreamFailed."""
        prompt = await self._prompt_tokens(post)
        completion = await self._completion_tokens(post)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def _prompt_tokens(self, post: Post) -> int:
        body = {**prepared(LLAMA_CPP_PYTHON, self.request), "stream": False, "max_tokens": 1}
        status, answer = await post(self.request.path, body)
        if status != 200:
            raise Broken(f"counting the prompt's tokens: {status}")
        return int(answer["usage"]["prompt_tokens"])

    async def _completion_tokens(self, post: Post) -> int:
        text = "".join(self.texts)
        if text.isascii() or "logprobs" in self.request.features.needs:
            return self.chunks
        return await count_tokens(text, post) - await count_tokens("", post)


async def count_tokens(text: str, post: Post) -> int:
    """With whatever the tokenizer puts before a text."""
    status, answer = await post("/extras/tokenize/count", {"input": text})
    if status != 200:
        raise Broken(f"/extras/tokenize/count says {status}")
    return int(answer["count"])


def _text_of(choice: Json) -> str | None:
    """The text that a chunk adds; None for the chunk that only names the role."""
    if "text" in choice:
        text: str = choice["text"]
        return text
    delta = choice.get("delta") or {}
    calls = delta.get("tool_calls")
    if calls:
        return "".join(call["function"].get("arguments") or "" for call in calls)
    content: str | None = delta.get("content")
    return content
