"""A scripted model that counts to N, for resumed streams. Like a real model, it continues the count in its prompt."""

from __future__ import annotations

import json
from typing import Any

from tests.support.fake_upstream import Script, Talk

PROMPT_TOKENS = 7
TEMPLATE = {
    "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "bos_token": None,
    "eos_token": "</s>",
}


def numbers(first: int, last: int, before: bool) -> list[str]:
    """One token per number, with the space `before` or after it."""
    return [f" {n}" if before else f"{n} " for n in range(first, last + 1)]


def prefix_of(path: str, body: dict[str, Any]) -> str:
    """The part of the answer that the prompt ends with."""
    if path == "/v1/completions":
        return str(body["prompt"]).partition("<assistant>")[2]
    last = body["messages"][-1]
    if last["role"] != "assistant":
        return ""
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    return str(last["content"])


class Chunks:
    """The events of one answer in the shape of vLLM and llama.cpp servers."""

    def __init__(self, path: str, body: dict[str, Any], name: str) -> None:
        self.chat = path.startswith("/v1/chat")
        self.head = {
            "id": f"chatcmpl-{name}", "created": len(name), "model": body.get("model", "m"),
            "object": "chat.completion.chunk" if self.chat else "text_completion",
        }  # fmt: skip

    def event(self, text: str | None = None, finish: str | None = None, role: bool = False) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.chat:
            delta = {"role": "assistant", "content": ""} if role else {} if text is None else {"content": text}
            choice["delta"] = delta
        else:
            choice["text"] = text or ""
        return self.data({**self.head, "choices": [choice]})

    def usage(self, prompt: int, completion: int) -> bytes:
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return self.data({**self.head, "choices": [], "usage": usage})

    def data(self, chunk: Any) -> bytes:
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def events_of(talk: Talk, last: int, before: bool, name: str) -> list[bytes]:
    body = talk.json
    prefix = prefix_of(talk.path, body)
    sent = len(prefix.split())
    chunks = Chunks(talk.path, body, name)
    tokens = numbers(sent + 1, last, before)
    if prefix and not before and tokens:  # the space that was stripped from the prompt
        tokens[0] = " " + tokens[0]
    limit = body.get("max_tokens") or len(tokens)
    finish = "stop" if limit >= len(tokens) else "length"
    tokens = tokens[:limit]
    events = [chunks.event(role=True)] if chunks.chat else []
    events += [chunks.event(token) for token in tokens]
    events.append(chunks.event(finish=finish))
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(chunks.usage(PROMPT_TOKENS + sent, len(tokens)))
    return [*events, b"data: [DONE]\n\n"]


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def counter(last: int, *, before: bool = True, name: str = "cpu") -> Script:
    """Answer every request completely."""

    async def script(talk: Talk) -> None:
        if "tokenize" in talk.path:
            text = next(talk.json[field] for field in ("prompt", "content", "input") if field in talk.json)
            words = text.replace("<assistant>", " ").split()
            await talk.answer(200, {"count": len(words), "tokens": list(range(len(words)))})
            return
        events = events_of(talk, last, before, name)
        await talk.send(STREAM_HEAD + b"".join(map(chunked, events)) + b"0\r\n\r\n")

    return script


def dying(last: int, cut: int, *, before: bool = True) -> Script:
    """Like counter(), but reset the connection after `cut` bytes of the response."""

    async def script(talk: Talk) -> None:
        events = events_of(talk, last, before, "gpu")
        await talk.send((STREAM_HEAD + b"".join(map(chunked, events)))[:cut])
        talk.reset()

    return script


def size_of_answer(talk: Talk, last: int, before: bool = True) -> int:
    return len(STREAM_HEAD + b"".join(map(chunked, events_of(talk, last, before, "gpu"))))
