"""A relay of uvicorn and our upstream connections alone. What xgen-proxy costs more is the cost of its features."""

import os
from typing import Any
from urllib.parse import urlsplit

from xgen_proxy.upstream.pool import Pool

target = urlsplit(os.environ["UPSTREAM"])
pool = Pool(str(target.hostname), int(target.port or 80))
HEAD = "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    head = HEAD.format(path=scope["path"], host=target.netloc, length=len(body))
    answer = await pool.exchange(head.encode() + body, 60)
    headers = [(name, value) for name, value in answer.headers.items() if name in (b"content-type", b"content-length")]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    while data := await answer.read(60):
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
    pool.release(answer)
