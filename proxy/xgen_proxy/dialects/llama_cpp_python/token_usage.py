"""Usage of a llama-cpp-python stream, which never has any: counted here, with the replica's help."""

from __future__ import annotations

import re
from itertools import groupby

from xgen_proxy.dialects.dialect import LLAMA_CPP_PYTHON, BackendRequest, Json, Post
from xgen_proxy.dialects.llama_cpp_python.stop_strings import text_of
from xgen_proxy.dialects.request_rules import prepared
from xgen_proxy.errors import UpstreamProtocolError


class TokenCounter:
    """Fed each chunk of the stream, before anything is cut from it.

    Completion tokens: it sends a chunk for each token, but holds tokens back until their bytes are whole characters. So
    a chunk of ASCII is one token, and stretches of other text are tokenized by the replica. Exact, unless the model
    wrote a character in other tokens than the tokenizer does: then off by one, mostly. They may be more than
    max_tokens, as by the replica's own count: it never ends within a character.

    Prompt tokens: of a completion, the tokenizer's count. A chat's template only the replica knows. Made too long by a
    known number of words, a chat is refused with its count before the cache is touched; asked twice, with twice the
    words, that gives the tokens without them (25 ms with 4,096 words). Where that cannot be, the same request again,
    whole and for one token: as exact, but the cache loses the answer, and a chat's next turn waits 1.6 s longer for
    its first token (200 tokens of answer, 135 M parameters, one core).
    """

    def __init__(self, request: BackendRequest) -> None:
        self.request = request
        self.texts: list[str] = []

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
        body = prepared(LLAMA_CPP_PYTHON, self.request)
        if "prompt" in body:
            return await count_tokens(body["prompt"], post)
        kept = {key: body[key] for key in ("model", "messages", *TEMPLATE_FIELDS) if key in body}
        ask = {**kept, "max_tokens": 1}
        return await self._refused_prompt_tokens(ask, post) or await self._asked_prompt_tokens(ask, post)

    async def _refused_prompt_tokens(self, ask: Json, post: Post) -> int | None:
        """None where the words would not stand apart from the text, or the replica did not say what was expected."""
        words = self.request.context
        text = ask["messages"][-1]["content"]
        if not words or not text or text[-1].isspace():
            return None
        counts = []
        for times in (1, 2):
            last = {**ask["messages"][-1], "content": text + WORD * words * times}
            status, answer = await post(self.request.path, {**ask, "messages": [*ask["messages"][:-1], last]})
            told = TOLD.search(str(answer)) if status == 400 else None
            if told is None:
                return None
            counts.append(int(told[1]))
        once, twice = counts
        return 2 * once - twice if (twice - once) % words == 0 else None

    async def _asked_prompt_tokens(self, ask: Json, post: Post) -> int:
        status, answer = await post(self.request.path, ask)
        if status != 200:
            raise UpstreamProtocolError(f"counting the prompt's tokens: {status}")
        return int(answer["usage"]["prompt_tokens"])

    async def _completion_tokens(self, post: Post) -> int:
        if "logprobs" in self.request.features.needs:  # then it sends each token alone
            return len(self.texts)
        if "forced_tool" in self.request.features.needs and self.texts and self.texts[-1] == "":
            self.texts.pop()  # its closing chunk, told twice
        tokens = 0
        for ascii, group in groupby(self.texts, str.isascii):
            texts = list(group)
            tokens += len(texts) if ascii else await self._tokens("".join(texts), len(texts), post)
        return tokens

    async def _tokens(self, text: str, chunks: int, post: Post) -> int:
        """Never fewer than chunks. What the tokenizer puts before any text is taken off."""
        return max(chunks, await count_tokens(text, post) - await count_tokens("", post))


WORD = " word"  # whatever stands before, tokenizers begin anew at a space and a letter
TOLD = re.compile(r"\((\d+) in the messages")
TEMPLATE_FIELDS = ("tools", "tool_choice", "functions", "function_call")  # what a chat template may read


async def count_tokens(text: str, post: Post) -> int:
    """With whatever the tokenizer puts before a text."""
    status, answer = await post("/extras/tokenize/count", {"input": text})
    if status != 200:
        raise UpstreamProtocolError(f"/extras/tokenize/count says {status}")
    return int(answer["count"])
