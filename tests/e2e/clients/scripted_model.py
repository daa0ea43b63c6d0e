"""A model whose words are scripted: it answers a question, and a task with a call of the tool that the client offers.

An engine that dies does so in the middle of such a call, after half of its arguments.

python -m tests.e2e.clients.scripted_model --port PORT [--dies-writing LINE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_upstream import FakeUpstream, Talk

Json = dict[str, Any]

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
TASK = "Write the line {line} into the file {path}"
BEFORE = "I will write the file. "
AFTER = "The file is written."
PROMPT_TOKENS = 17
ASKED = re.compile(r"Write the line (\w+) into the file (\S+\.txt)")

# What agents call their tools and the arguments of these, in the order in which the model prefers the tools.
TOOLS = (
    "Write", "write", "write_file", "WriteFile", "editor", "apply_patch",
    "exec_command", "shell_command", "shell", "run_commands", "run_shell_command", "Bash", "bash",
)  # fmt: skip
PATHS = frozenset({"path", "file_path", "filePath", "absolute_path"})
CONTENTS = frozenset({"content", "contents", "file_text", "new_text"})
COMMANDS = frozenset({"cmd", "command", "commands"})
PATCHES = frozenset({"input", "patch", "patchText"})
PLAIN: dict[str, Any] = {"boolean": False, "integer": 1, "number": 1, "array": [], "object": {}}


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is JSON."""

    name: str
    arguments: str

    @property
    def pieces(self) -> list[str]:
        return [self.arguments[at : at + 8] for at in range(0, len(self.arguments), 8)]


@dataclass(frozen=True)
class Words:
    """What the model says to one request: text, then maybe a call."""

    text: str
    call: Call | None = None

    @property
    def pieces(self) -> list[str]:
        return re.findall(r"\S+\s*", self.text)

    @property
    def finish(self) -> str:
        return "tool_calls" if self.call else "stop"

    @property
    def usage(self) -> Json:
        completion = len(self.pieces) + (len(self.call.pieces) if self.call else 0)
        return {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": completion,
            "total_tokens": PROMPT_TOKENS + completion,
        }


def words_for(body: Json) -> Words:
    """Decided by the newest task among the user's messages, and by whether a tool has answered since."""
    messages, said = body["messages"], ANSWER
    schemas = {each["function"]["name"]: each["function"].get("parameters") or {} for each in body.get("tools") or ()}
    for at, message in reversed(list(enumerate(messages))):
        asked = ASKED.findall(text_of(message)) if message["role"] == "user" else []
        if asked:
            if any(later["role"] == "tool" for later in messages[at:]):
                said = AFTER
                break
            return next((Words(BEFORE, call) for call in calls(schemas, *asked[-1])), Words(ANSWER))
    forced = body.get("tool_choice")
    if isinstance(forced, dict) or forced == "required":  # structured output: the text is an argument
        # llama-server is given the one tool that the client named, and must call one, which its grammar enforces
        name = forced["function"]["name"] if isinstance(forced, dict) else next(iter(schemas))
        return Words("", Call(name, json.dumps(dict.fromkeys(schemas[name].get("properties") or {}, said))))
    return Words(said)


def text_of(message: Json) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part.get("text") or "" for part in content)
    return content or ""


def calls(schemas: dict[str, Json], line: str, path: str) -> Iterator[Call]:
    """The calls that write the line, the best first."""
    for name in TOOLS:
        if name in schemas:
            yield Call(name, json.dumps(arguments(schemas[name], line, path)))


def arguments(schema: Json, line: str, path: str) -> Json:
    command = f"echo '{line}' > {path}"
    values: Json = {}
    for name, kind in (schema.get("properties") or {}).items():
        listed = kind.get("type") == "array"
        if name in PATHS:
            values[name] = path
        elif name in CONTENTS:
            values[name] = f"{line}\n"
        elif name in PATCHES:
            values[name] = f"*** Begin Patch\n*** Add File: {path}\n+{line}\n*** End Patch\n"
        elif name == "command" and listed:
            values[name] = ["bash", "-c", command]
        elif name in COMMANDS:
            values[name] = [command] if listed else command
        elif name in (schema.get("required") or ()):
            values[name] = (kind.get("enum") or [PLAIN.get(kind.get("type"), "write the file")])[0]
    return values


@dataclass
class ScriptedModel:
    """The script of a backend. `die` ends that backend at once; it is called in the middle of the call that writes
    `dies_writing`."""

    die: Callable[[], None] | None = None
    dies_writing: str = ""
    asked: list[Json] = field(default_factory=list)
    counted: list[Json] = field(default_factory=list)  # the usage of each answer
    died: bool = False

    async def __call__(self, talk: Talk) -> None:
        body = talk.json
        if talk.path != "/v1/chat/completions":  # the proxy asks for a number of tokens, or whether the engine lives
            await self._answer_proxy(talk, body)
            return
        self.asked.append(body)
        words, said = words_for(body), begun(body)
        assert words.text.startswith(said), f"it has to go on after {said!r}"
        words = Words(words.text[len(said) :], words.call)
        self.counted.append(words.usage)
        if body.get("stream"):
            await self._stream(talk, body, words)
        elif self._is_to_die(words):
            await self._die()
        else:
            await talk.answer(200, whole(body, words))

    async def _answer_proxy(self, talk: Talk, body: Json) -> None:
        if talk.path == "/v1/completions":
            await talk.answer(200, {"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]})
        else:
            await talk.answer(200, {"count": len(str(body.get("prompt") or body.get("content")).split())})

    def _is_to_die(self, words: Words) -> bool:
        return self.die is not None and words.call is not None and self.dies_writing in words.call.arguments

    async def _die(self) -> None:
        assert self.die is not None
        self.died = True
        await asyncio.to_thread(self.die)

    async def _stream(self, talk: Talk, body: Json, words: Words) -> None:
        await talk.start_stream()
        await talk.event(chunk(body, {"role": "assistant", "content": ""}))
        for piece in words.pieces:
            await talk.event(chunk(body, {"content": piece}))
        if words.call:
            deltas = list(deltas_of(words.call))
            for delta in deltas[: len(deltas) // 2] if self._is_to_die(words) else deltas:
                await talk.event(chunk(body, {"tool_calls": [delta]}))
            if self._is_to_die(words):
                await self._die()
                return
        await talk.event(chunk(body, {}, words.finish))
        if (body.get("stream_options") or {}).get("include_usage"):
            await talk.event({**chunk(body, {}), "choices": [], "usage": words.usage})
        await talk.end()


def begun(body: Json) -> str:
    """The beginning of the answer, where another backend has said it already."""
    last = body["messages"][-1]
    return text_of(last) if last["role"] == "assistant" and not last.get("tool_calls") else ""


def deltas_of(call: Call) -> Iterator[Json]:
    yield {"index": 0, "id": "call_1", "type": "function", "function": {"name": call.name, "arguments": ""}}
    for piece in call.pieces:
        yield {"index": 0, "function": {"arguments": piece}}


def chunk(body: Json, delta: Json, finish: str | None = None) -> Json:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"],
        "choices": [choice],
    }  # fmt: skip


def whole(body: Json, words: Words) -> Json:
    message: Json = {"role": "assistant", "content": words.text or None}
    if words.call:
        function = {"name": words.call.name, "arguments": words.call.arguments}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": words.finish}],
        "usage": words.usage,
    }  # fmt: skip


def scripted_backend(dies_writing: str | None = None) -> tuple[FakeUpstream, ScriptedModel]:
    """A backend and its script; with `dies_writing`, the backend dies as if killed while it writes that."""
    engine = FakeUpstream(tokens=[1])
    model = ScriptedModel()
    if dies_writing is not None:
        model = ScriptedModel(engine.kill, dies_writing)
    engine.default = model
    return engine, model


def serve() -> None:
    """As a process of its own, which kills itself with SIGKILL where it is told to die."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dies-writing", metavar="LINE")
    arguments = parser.parse_args()
    model = ScriptedModel()
    if arguments.dies_writing:
        model = ScriptedModel(lambda: os.kill(os.getpid(), signal.SIGKILL), arguments.dies_writing)
    FakeUpstream(model, tokens=[1], port=arguments.port)
    signal.pause()


if __name__ == "__main__":
    serve()
