"""create_app(): the routes and the life of the process, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from proxy import openai_api, ops_api
from proxy.client import request_id
from proxy.errors import ClientLeft, MethodNotAllowed, NotFound, ProxyError
from proxy.gateway import Gateway
from proxy.generate_api import GenerateEndpoint
from proxy.openai_api import Generate
from proxy.peer import client_address
from proxy.reload import Reloader
from proxy.settings import Settings
from proxy.telemetry import CLIENT_LEFT


def create_app(settings: Settings, read_again: Callable[[], Settings] | None = None) -> Front:
    """`read_again`: the settings as they are written by then, for reloads; raises ConfigError."""
    gateway = Gateway(settings)
    reloader = Reloader(gateway, read_again) if read_again else None

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await gateway.start()
        if reloader:
            reloader.start()
        yield
        if reloader:
            await reloader.stop()
        await gateway.stop()

    app = Starlette(
        routes=[
            Route("/v1/models", openai_api.list_models),
            Route("/v1/models/{model:path}", openai_api.get_model),
            Route("/generate", GenerateEndpoint(gateway, always_streams=False), methods=["POST"]),
            Route("/generate/stream", GenerateEndpoint(gateway, always_streams=True), methods=["POST"]),
            Route("/route", ops_api.route, methods=["POST"]),
            Route("/health", ops_api.health),
            Route("/ready", ops_api.ready),
            Route("/models/status", ops_api.status),
            Route("/metrics", ops_api.metrics),
        ],
        exception_handlers={ProxyError: show_proxy_error, HTTPException: show_http_error, ClientLeft: show_nobody},
        lifespan=lifespan,
    )
    app.state.gateway = gateway
    return Front(app, gateway)


class Front:
    """Takes the hot routes past Starlette's router and middleware."""

    def __init__(self, app: Starlette, gateway: Gateway) -> None:
        self.app = app
        self.gateway = gateway
        self.hot = {
            "/v1/chat/completions": Generate(gateway, "chat"),
            "/v1/completions": Generate(gateway, "completions"),
            "/v1/embeddings": Generate(gateway, "embeddings"),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = self.hot.get(scope["path"]) if scope["type"] == "http" else None
        await (hot or self.app)(scope, receive, send)


async def show_proxy_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProxyError):
        raise error
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    id = headers["x-request-id"] = request_id(dict(request.scope["headers"]))
    gateway: Gateway = request.app.state.gateway
    client = client_address(request.scope, gateway.settings.trusted_proxies)
    gateway.telemetry.refused(id, "other", error, client)
    return Response(error.body(), error.status, headers)


async def show_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    if not isinstance(error, HTTPException):
        raise error
    path, method = request.url.path, request.method
    if error.status_code == 405:
        allowed = (error.headers or {})["Allow"]
        return await show_proxy_error(request, MethodNotAllowed(path, method, allowed))
    return await show_proxy_error(request, NotFound(f"there is nothing at {path}; the API is under /v1"))


async def show_nobody(request: Request, error: Exception) -> Response:
    """The client left while it sent its body: what is answered goes nowhere, and is no fault of the proxy's."""
    return Response(status_code=CLIENT_LEFT)
