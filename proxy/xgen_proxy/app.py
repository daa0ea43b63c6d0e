"""create_app(): the routes and the life of the process, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from xgen_proxy.api import openai, ops
from xgen_proxy.api.generate import GenerateEndpoint
from xgen_proxy.api.openai import InferenceEndpoint
from xgen_proxy.config.loading import ConfigSources
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream.client_address import client_address
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.errors import ClientDisconnectedError, MethodNotAllowedError, NotFoundError, ProxyError
from xgen_proxy.gateway import Gateway
from xgen_proxy.observability.metrics import CLIENT_LEFT
from xgen_proxy.reload import Reloader


def create_app(settings: Settings, sources: ConfigSources | None = None) -> ProxyApp:
    """`sources`: where reloads read the settings again. None: there are no reloads."""
    gateway = Gateway(settings)
    reloader = Reloader(gateway, sources) if sources else None

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
            Route("/v1/models", openai.list_models),
            Route("/v1/models/{model:path}", openai.get_model),
            Route("/generate", GenerateEndpoint(gateway, always_streams=False), methods=["POST"]),
            Route("/generate/stream", GenerateEndpoint(gateway, always_streams=True), methods=["POST"]),
            Route("/route", ops.route, methods=["POST"]),
            Route("/health", ops.health),
            Route("/ready", ops.ready),
            Route("/models/status", ops.status),
            Route("/metrics", ops.metrics),
        ],
        exception_handlers={
            ProxyError: show_proxy_error,
            HTTPException: show_http_error,
            ClientDisconnectedError: show_nobody,
        },
        lifespan=lifespan,
    )
    app.state.gateway = gateway
    return ProxyApp(app, gateway)


class ProxyApp:
    """Takes the hot routes past Starlette's router and middleware."""

    def __init__(self, app: Starlette, gateway: Gateway) -> None:
        self.app = app
        self.gateway = gateway
        self.hot = {
            "/v1/chat/completions": InferenceEndpoint(gateway, "chat"),
            "/v1/completions": InferenceEndpoint(gateway, "completions"),
            "/v1/embeddings": InferenceEndpoint(gateway, "embeddings"),
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
        return await show_proxy_error(request, MethodNotAllowedError(path, method, allowed))
    return await show_proxy_error(request, NotFoundError(f"there is nothing at {path}; the API is under /v1"))


async def show_nobody(request: Request, error: Exception) -> Response:
    """The client left while it sent its body: what is answered goes nowhere, and is no fault of the proxy's."""
    return Response(status_code=CLIENT_LEFT)
