"""A fast scripted vLLM for bench/streams.py and bench/soak.py. The prompt sets the pace; requests can fail.

    python -m bench.upstream --port 8001 --faults 0.1 --seed 1

POST /v1/completions and /v1/chat/completions send `max_tokens` chunks, one every N ms if the prompt begins with N:
"250 ms each". The text of a chunk is the time it was sent, in ns of CLOCK_MONOTONIC, which all processes of a machine
share. `--faults` is the share of requests that fail, each in one of the ways of FAULTS. Prints its port on stdout when
it listens. Slow readers block its writes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-1","object":"%b","created":1,"model":"m","choices":'
    b'[{"index":0,%b,"logprobs":null,"finish_reason":%b}]}\n\n'
)
MODELS = b'{"object":"list","data":[{"id":"m","object":"model","max_model_len":1000000}]}'
METRICS = b'vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_waiting{engine="0"} 0\n'
ERROR = b'{"error":{"message":"scripted","type":"InternalServerError","param":null,"code":500}}'


class Exchange:
    """One request and its connection."""

    def __init__(self, path: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.request: dict[str, Any] = json.loads(body)
        self.chat = path.endswith(b"/chat/completions")
        self.reader, self.writer = reader, writer
        self.kind = b"chat.completion.chunk" if self.chat else b"text_completion"
        prompt = self.request["messages"][0]["content"] if self.chat else self.request["prompt"]
        self.gap = float(prompt.split()[0]) / 1000  # a resumed request has more text after it
        self.chunks = int(self.request["max_tokens"])

    async def start(self) -> None:
        await self.write(HEAD)
        if self.chat:
            await self.chunk(EVENT % (self.kind, b'"delta":{"role":"assistant","content":""}', b"null"))

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def whole(self, status: int, body: bytes) -> None:
        await self.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            status, len(body), body,
        ))  # fmt: skip

    def event(self, finish: bytes = b"null") -> bytes:
        field = b'"delta":{"content":"%d "}' if self.chat else b'"text":"%d "'
        return EVENT % (self.kind, field % time.monotonic_ns(), finish)

    async def answer(self) -> None:
        if self.request.get("stream"):
            await self.start()
            await self.events(self.chunks - 1)
            await self.chunk(self.event(b'"length"'))
            await self.chunk(b"data: [DONE]\n\n")
            await self.write(b"0\r\n\r\n")
        else:
            await asyncio.sleep(self.gap * self.chunks)
            await self.whole(200, self.body())

    async def events(self, count: int) -> None:
        """Send chunks at fixed times instead of sleeping between them, so that a busy process keeps the pace."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(count):
            await self.chunk(self.event())
            due += self.gap
            await asyncio.sleep(max(0.0, due - loop.time()))

    def body(self) -> bytes:
        text = " token" * self.chunks
        shown = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        usage = {"prompt_tokens": 1, "completion_tokens": self.chunks, "total_tokens": self.chunks + 1}
        choice = {"index": 0, **shown, "logprobs": None, "finish_reason": "length"}
        kind = "chat.completion" if self.chat else "text_completion"
        answer = {"id": "cmpl-1", "object": kind, "created": 1, "model": "m", "choices": [choice], "usage": usage}
        return json.dumps(answer).encode()

    async def begin(self) -> None:
        """Send half of a stream, or nothing of a non-streaming response."""
        if self.request.get("stream"):
            await self.start()
            await self.events(max(1, self.chunks // 2))


async def says_500(exchange: Exchange) -> None:
    await exchange.whole(500, ERROR)


async def says_busy(exchange: Exchange) -> None:
    await exchange.whole(503, ERROR)


async def resets_at_once(exchange: Exchange) -> None:
    exchange.writer.transport.abort()


async def resets_amid(exchange: Exchange) -> None:
    await exchange.begin()
    exchange.writer.transport.abort()


async def ends_amid(exchange: Exchange) -> None:
    await exchange.begin()
    exchange.writer.close()


async def fails_in_the_stream(exchange: Exchange) -> None:
    if not exchange.request.get("stream"):
        await says_500(exchange)
        return
    await exchange.begin()
    await exchange.chunk(b"data: " + ERROR + b"\n\ndata: [DONE]\n\n")
    await exchange.write(b"0\r\n\r\n")


async def stalls_amid(exchange: Exchange) -> None:
    """Send nothing until the client disconnects."""
    await exchange.begin()
    await exchange.reader.read()
    exchange.writer.close()


FAULTS: list[Callable[[Exchange], Awaitable[None]]] = [
    says_500, says_busy, resets_at_once, resets_amid, ends_amid, fails_in_the_stream, stalls_amid,
]  # fmt: skip


class Upstream:
    """`faults`: the share of requests that fail. The seed and the order of the requests determine which."""

    def __init__(self, faults: float, seed: int) -> None:
        self.faults = faults
        self.random = random.Random(seed)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has disconnected
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, body = await read_request(reader)
        if method == b"GET":
            page = MODELS if path == b"/v1/models" else METRICS
            await write_page(writer, page)
            return
        if path not in (b"/v1/completions", b"/v1/chat/completions"):
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            return
        exchange = Exchange(path, body, reader, writer)
        failing = self.random.random() < self.faults
        await (self.random.choice(FAULTS)(exchange) if failing else exchange.answer())


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes, bytes]:
    """(method, path, body)"""
    head = await reader.readuntil(b"\r\n\r\n")
    method, path, _ = head.split(b" ", 2)
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return method, path, await reader.readexactly(length)


async def write_page(writer: asyncio.StreamWriter, page: bytes) -> None:
    kind = b"application/json" if page.startswith(b"{") else b"text/plain; version=0.0.4"
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(page), page))
    await writer.drain()


async def listen(port: int, faults: float, seed: int) -> None:
    server = await asyncio.start_server(Upstream(faults, seed).serve, "127.0.0.1", port, backlog=4096)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--faults", type=float, default=0.0, metavar="SHARE", help="share of failing requests, 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    uvloop.run(listen(options.port, options.faults, options.seed))


if __name__ == "__main__":
    main()
