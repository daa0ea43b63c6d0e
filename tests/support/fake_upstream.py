"""A scripted backend on a real socket, for faults and timing that a real server cannot produce on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

PROBE = b"The quick brown fox"

Script = Callable[["Talk"], Coroutine[Any, Any, None]]

METRICS = """\
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0"}} {kv}
vllm:num_preemptions_total{{engine="0"}} {preemptions}
"""


@dataclass
class Talk:
    """One POST as the script sees it."""

    path: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int, body: Any, headers: str = "") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
        await self.send(head.encode() + data)

    async def start_stream(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        await self.chunk(f"data: {text}\n\n".encode())

    async def end(self, done: bool = True) -> None:
        if done:
            await self.chunk(b"data: [DONE]\n\n")
        await self.send(b"0\r\n\r\n")

    def reset(self) -> None:
        """Send RST, as a killed process with unread data does."""
        self.writer.transport.abort()

    async def until_client_leaves(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client may reset the connection
            while await self.reader.read(65536):
                pass


def delta(
    content: str | None = None, finish: str | None = None, id: str = "chatcmpl-1", **extra: Any
) -> dict[str, Any]:
    piece = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": piece, "logprobs": None, "finish_reason": finish}
    return {
        "id": id, "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **extra,
    }  # fmt: skip


def whole(content: str = "hello", finish: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }  # fmt: skip


async def good(talk: Talk) -> None:
    """Answer `hello`, streamed if requested."""
    if not talk.json.get("stream"):
        await talk.answer(200, whole())
        return
    await talk.start_stream()
    for word in ("hel", "lo"):
        await talk.event(delta(word))
    await talk.event(delta(finish="stop"))
    await talk.end()


def status(code: int, body: Any = None, headers: str = "") -> Script:
    async def script(talk: Talk) -> None:
        await talk.answer(code, body or {"error": {"message": f"no {code}", "type": "t", "code": code}}, headers)

    return script


@dataclass
class FakeUpstream:
    """A fake vLLM. Each request uses up one of `scripts`; when there are none, `default` answers."""

    default: Script = good
    scripts: list[Script] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["m"])
    running: int = 0
    waiting: int = 0
    kv: float = 0.0
    tokens: list[int] = field(default_factory=list)  # of the capability request; empty: it has no route that tells
    preemptions: int = 0
    sees: bool | None = None  # None: it has no route that tells
    scrapes: int = 0  # GETs of /metrics: one for each health check of a vLLM
    looks: int = 0  # questions of the proxy whether it sees or hears
    reranks: bool = False
    routes: list[str] | None = None  # that it has for POST; None: it answers each GET
    health: int = 200
    talks: list[Talk] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Listen; after kill() on the same port."""
        self._server = self._run(asyncio.start_server(self._serve, self.host, self.port))
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """Stop listening and reset all connections, as kill -9 does."""
        self._run(self._kill())

    def close(self) -> None:
        self.kill()
        self._run(self._cancel_scripts())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _kill(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _cancel_scripts(self) -> None:
        """End what still waits or writes, so that nothing is left to be collected after the loop."""
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        talk = Talk(path, headers, body, reader, writer)
        if method == "GET":
            await self.answer_check(talk)
        elif path == "/tokenize" and (b"image_url" in body or b"input_audio" in body):
            self.looks += 1
            await self.answer_media_probe(talk)
        elif path == "/extras/tokenize" or (path == "/tokenize" and PROBE in body):
            await self.answer_probe(talk)
        elif path == "/v1/rerank" and body == b"{}":  # whether a llama-server reranks
            await talk.answer(400 if self.reranks else 501, {})
        else:
            self.talks.append(talk)
            await (self.scripts.pop(0) if self.scripts else self.default)(talk)
        return not writer.is_closing()

    async def answer_probe(self, talk: Talk) -> None:
        """The proxy compares the tokenizers of backends that serve the same model."""
        await talk.answer(*((200, {"tokens": self.tokens}) if self.tokens else (404, {})))

    async def answer_media_probe(self, talk: Talk) -> None:
        if self.sees is None:
            await talk.answer(404, {"detail": "Not Found"})
        elif self.sees and b"image_url" in talk.body:
            await talk.answer(200, {"count": 5, "tokens": [1] * 5})
        else:
            at_most = (
                "At most 0 audio(s) may be provided in one prompt." if self.sees else "m is not a multimodal model"
            )
            await talk.answer(400, {"error": {"message": at_most, "type": "BadRequestError", "code": 400}})

    async def answer_check(self, talk: Talk) -> None:
        self.scrapes += talk.path == "/metrics"
        if self.health != 200:
            await talk.answer(self.health, {})
        elif talk.path == "/v1/models":
            await talk.answer(200, {"data": [{"id": name, "max_model_len": 2048} for name in self.models]})
        elif self.routes is not None and talk.path != "/metrics":
            await talk.answer(405 if talk.path in self.routes else 404, {})
        else:
            page = METRICS.format(running=self.running, waiting=self.waiting, kv=self.kv, preemptions=self.preemptions)
            await talk.answer(200, page.encode())


async def silent(talk: Talk) -> None:
    await talk.until_client_leaves()
