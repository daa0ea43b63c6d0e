"""A scripted model whose answer has reasoning, text and a tool call. Like a real one, it goes on after its prompt."""

from __future__ import annotations

import json
from typing import Any

from tests.support.counting_upstream import PROMPT_TOKENS, STREAM_HEAD, chunked
from tests.support.fake_upstream import Script, Talk

Pieces = list[tuple[str, str]]  # (reasoning, text or call; a token)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL: Pieces = [("call", '{"n":'), ("call", " 12"), ("call", "}")]


def said(pieces: Pieces, kind: str) -> str:
    return "".join(token for each, token in pieces if each == kind)


def prompted(body: dict[str, Any]) -> tuple[str, str]:
    """(the reasoning, the text) that the prompt ends with, as vLLM and llama-server are told them."""
    last = body["messages"][-1]
    if last["role"] != "assistant":
        return "", ""
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    reasoning, text = last.get("reasoning_content") or last.get("reasoning") or "", last["content"]
    if text.startswith("<think>\n"):
        reasoning, _, text = text.removeprefix("<think>\n").partition("\n</think>\n\n")
    return reasoning, text


def rest(pieces: Pieces, reasoning: str, text: str) -> Pieces:
    """The pieces after those in the prompt. A space that was cut from the prompt is written again."""
    left = []
    known = {"reasoning": reasoning, "text": text}
    if text:
        known["reasoning"] = said(pieces, "reasoning")
    for kind, token in pieces:
        had = known.get(kind, "")
        assert token.startswith(had[: len(token)]), f"{had!r} in the prompt is not how the answer goes on: {token!r}"
        known[kind] = had[len(token) :]
        if new := token[len(had) :]:
            left.append((kind, new))
    return left


def events_of(talk: Talk, pieces: Pieces, name: str) -> list[bytes]:
    body = talk.json
    head = {"id": name, "object": "chat.completion.chunk", "created": len(name), "model": "m"}

    def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
        return data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def data(chunk: Any) -> bytes:
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"

    reasoning, text = prompted(body)
    left = rest(pieces, reasoning, text)
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    called = False
    for kind, token in left:
        call: dict[str, Any] = {"index": 0, "function": {"arguments": token}}
        if kind == "call" and not called:
            call = {"index": 0, "id": f"of-{name}", "type": "function", "function": {"name": "f", "arguments": token}}
            called = True
        deltas.append({"text": {"content": token}, "reasoning": {"reasoning": token}}.get(kind, {"tool_calls": [call]}))
    events = [event(delta) for delta in deltas]
    events.append(event({}, "tool_calls" if called else "stop"))
    if (body.get("stream_options") or {}).get("include_usage"):
        tokens = PROMPT_TOKENS + len(pieces) - len(left), len(left)
        usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True))
        events.append(data({**head, "choices": [], "usage": {**usage, "total_tokens": sum(tokens)}}))
    return [*events, b"data: [DONE]\n\n"]


def whole(talk: Talk, pieces: Pieces, name: str) -> bytes:
    return STREAM_HEAD + b"".join(map(chunked, events_of(talk, pieces, name))) + b"0\r\n\r\n"


def answering(pieces: Pieces, name: str = "cpu") -> Script:
    async def script(talk: Talk) -> None:
        if "tokenize" in talk.path:
            text = next(talk.json[field] for field in ("prompt", "content") if field in talk.json)
            await talk.answer(200, {"tokens": [0] * len(text.split())})
        else:
            await talk.send(whole(talk, pieces, name))

    return script


def dying(pieces: Pieces, cut: int, name: str = "gpu") -> Script:
    """Resets the connection after `cut` bytes of the response."""

    async def script(talk: Talk) -> None:
        await talk.send(whole(talk, pieces, name)[:cut])
        talk.reset()

    return script
