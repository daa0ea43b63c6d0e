"""The simplest relay: Starlette and one httpx client."""

import os

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
client = httpx.AsyncClient(base_url=os.environ["UPSTREAM"], timeout=60, limits=limits)


async def relay(request: Request) -> StreamingResponse:
    headers = {"content-type": "application/json"}
    upstream = client.build_request("POST", request.url.path, content=await request.body(), headers=headers)
    answer = await client.send(upstream, stream=True)
    kind = answer.headers["content-type"]
    return StreamingResponse(answer.aiter_raw(), answer.status_code, {"content-type": kind})


app = Starlette(routes=[Route("/{path:path}", relay, methods=["POST"])])
