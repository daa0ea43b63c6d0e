"""One model in llama.cpp: the logits of a window, the speed, a greedy answer. Runs in a worker process only."""

from __future__ import annotations

import time
from collections.abc import Sequence

import llama_cpp
import numpy as np
import psutil
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from xgen_proxy.models.compare.divergence import Logits


class Model:
    """`context`: the tokens that it can hold, and that it takes in one batch. It runs on the CPU."""

    def __init__(self, path: str, context: int, threads: int, mmap: bool) -> None:
        began = time.perf_counter()
        self._llama = llama_cpp.Llama(
            path, n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads, n_threads_batch=threads,
            n_gpu_layers=0, use_mmap=mmap, verbose=True,
        )  # fmt: skip
        self.load_s = time.perf_counter() - began
        self.vocabulary_size = int(self._llama.n_vocab())
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._llama.model)
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)

    def vocabulary(self) -> list[bytes]:
        """The text of each token, and whether a text begins with a token of its own."""
        texts = [llama_cpp.llama_vocab_get_text(self._vocabulary, token) for token in range(self.vocabulary_size)]
        return [*texts, str(self._begins()).encode()]

    def _begins(self) -> bool:
        return bool(llama_cpp.llama_vocab_get_add_bos(self._vocabulary))

    def tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self._llama.tokenize(text.encode(), add_bos=True, special=False)]

    def window(self, tokens: Sequence[int]) -> Logits:
        """The logits from the middle of the window on, without the last token's: nothing follows it.

        llama.cpp's `llama-perplexity` does the same, so that each scored token has half a window before it. Where the
        model's texts begin with a token of its own, the window does.
        """
        first = [self._llama.token_bos()] if self._begins() else tokens[:1]
        half = len(tokens) // 2
        self._forget()
        self._decode([*first, *tokens[1:]], 0, wanted=range(half, len(tokens) - 1))
        logits = self._logits(len(tokens) - 1 - half)
        if np.isnan(logits).any():
            raise ValueError("what it says is not a number; its weights are damaged, fetch or make it again")
        return logits

    def speed(self, tokens: Sequence[int], count: int) -> dict[str, float]:
        """Read `tokens` in one batch, then generate `count` tokens one by one; tokens per second of each."""
        self._forget()
        began = time.perf_counter()
        self._decode(tokens, 0, wanted=range(len(tokens) - 1, len(tokens)))
        token = self._best()
        read = time.perf_counter()
        for place in range(len(tokens), len(tokens) + count):
            self._decode([token], place, wanted=range(1))
            token = self._best()
        done = time.perf_counter()
        return {"prompt": len(tokens) / (read - began), "generation": count / (done - read)}

    def answer(self, prompt: str, count: int) -> list[int]:
        """The likeliest tokens, up to `count` or the end of the answer."""
        tokens = self._llama.tokenize(self._chat(prompt).encode(), add_bos=True, special=True)
        tokens = tokens[: self._llama.n_ctx() - count]
        self._forget()
        self._decode(tokens, 0, wanted=range(len(tokens) - 1, len(tokens)))
        found: list[int] = []
        while len(found) < count:
            token = self._best()
            if llama_cpp.llama_vocab_is_eog(self._vocabulary, token):
                break
            found.append(token)
            self._decode([token], len(tokens) + len(found) - 1, wanted=range(1))
        return found

    def _chat(self, prompt: str) -> str:
        """In the model's own chat template; a model without one continues the bare prompt."""
        template = self._llama.metadata.get("tokenizer.chat_template")
        if not template:
            return prompt
        begin, end = (self._text(token) for token in (self._llama.token_bos(), self._llama.token_eos()))
        formatter = Jinja2ChatFormatter(template, end, begin)
        rendered: str = formatter(messages=[{"role": "user", "content": prompt}]).prompt
        return rendered.removeprefix(begin) if begin and self._begins() else rendered

    def _text(self, token: int) -> str:
        text = llama_cpp.llama_vocab_get_text(self._vocabulary, token) if token >= 0 else b""
        return str(text.decode())

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llama.ctx), True)

    def _decode(self, tokens: Sequence[int], at: int, wanted: range) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = at + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = place in wanted
        status = llama_cpp.llama_decode(self._llama.ctx, batch)
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")

    def _logits(self, rows: int) -> Logits:
        """llama.cpp's own memory, valid until the next batch."""
        pointer = llama_cpp.llama_get_logits(self._llama.ctx)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary_size))

    def _best(self) -> int:
        return int(self._logits(1)[0].argmax())


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
