"""Requests that try to harm other clients: what bench/chaos.py mixes into its storm.

Each is a sequence of raw bytes and pauses on a connection of its own, from a client that then reads a little, or
nothing, and closes. How it is answered does not matter; what it does to others does.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

MEGABYTE = 1024 * 1024
READ_S = 5.0  # a hostile client reads for so long, then it disconnects

Json = dict[str, Any]
Step = bytes | float  # bytes to send, or seconds to wait
USER = [{"role": "user", "content": "Hi"}]


def post(body: bytes, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def chat(**fields: Any) -> bytes:
    return post(json.dumps({"messages": USER, "max_tokens": 4, **fields}).encode())


def schema(value: Json) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


def chunked(*parts: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(parts)


def nested(depth: int) -> Json:
    value: Json = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


BODIES: dict[str, Callable[[], bytes]] = {
    "empty arrays, 9 MB": lambda: post(b'{"messages":[' + b"[]," * (3 * MEGABYTE) + b"[]]}"),
    "a body over the limit": lambda: post(b'{"x":"' + b"a" * (11 * MEGABYTE) + b'"}'),
    "60 levels": lambda: post(b'{"metadata":' + b"[" * 60 + b"]" * 60 + b"}"),
    "not UTF-8": lambda: post(b'{"messages":[{"role":"user","content":"\xff\xfe"}]}'),
    "100,000 stop strings": lambda: chat(stop=[f"s{n}" for n in range(100_000)], stream=True),
    "a long stop string": lambda: chat(stop="a" * MEGABYTE),
    "a model's name of 1 MB": lambda: chat(model="m" * MEGABYTE),
    "a logit bias for each token": lambda: chat(logit_bias={str(n): 1 for n in range(50_000)}),
    "a pattern that backtracks": lambda: schema({"type": "string", "pattern": "^(a+)+$" * 20}),
    "an enum of 20,000": lambda: schema({"enum": [f"v{n}" for n in range(20_000)]}),
    "a deep schema": lambda: schema(nested(30)),
    "references without end": lambda: schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "roles that do not alternate": lambda: chat(messages=[{"role": "tool", "content": "x", "tool_call_id": "a"}] * 3),
    "scheduling fields": lambda: chat(priority=-(2**31), request_id="x", kv_transfer_params={"a": 1}),
    "many choices": lambda: chat(n=8, best_of=8, logprobs=True, top_logprobs=20),
    "token ids out of range": lambda: post(b'{"prompt":[999999999],"max_tokens":4}', path="/v1/completions"),
    "a prompt over the context": lambda: chat(messages=[{"role": "user", "content": "word " * 60_000}]),
    "a header of 100 KB": lambda: post(b"{}", "x-a: " + "a" * 100_000),
    "a bad chunk size": lambda: chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "a flood of trailers": lambda: chunked(b"2\r\n{}\r\n0\r\n", *[b"a: b\r\n"] * 50_000, b"\r\n"),
    "two lengths": lambda: post(b"{}", "content-length: 5"),
    "no HTTP": lambda: b"\x16\x03\x01\x02\x00" * 100,
}


def requests(seed: random.Random, *, silence_s: float = 20.0) -> Iterator[tuple[str, list[Step]]]:
    """Endless, each kind equally often: a name, and what the client does before it reads."""
    whole: list[tuple[str, Callable[[], list[Step]]]] = [
        *((name, lambda make=make: [make()]) for name, make in BODIES.items()),
        ("half a head, then silence", lambda: [b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n", silence_s]),
        ("half a body, then silence", lambda: [chat()[:-10], silence_s]),
        ("a stream that is left at once", lambda: [chat(stream=True, max_tokens=60), 0.3]),
    ]
    while True:
        seed.shuffle(whole)
        for name, steps in whole:
            yield name, steps()


async def attack(port: int, steps: list[Step]) -> None:
    """Returns after at most some 30 s. Connection errors are expected."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for step in steps:
                    if isinstance(step, bytes):
                        writer.write(step)
                        await writer.drain()
                    else:
                        await asyncio.sleep(step)
                async with asyncio.timeout(READ_S):
                    await reader.read(65536)
            finally:
                writer.transport.abort()
