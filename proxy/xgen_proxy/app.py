"""create_app(): the routes, and the start and stop of the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from xgen_proxy.api import messages, openai, ops, responses
from xgen_proxy.api.description.document import openapi
from xgen_proxy.api.description.page import docs
from xgen_proxy.api.generate import GenerateEndpoint
from xgen_proxy.api.opaque import opaque_routes
from xgen_proxy.api.paths import canonical, similar
from xgen_proxy.config.loading import ConfigSources
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream.client_address import client_address
from xgen_proxy.downstream.cors import is_preflight, preflight_headers
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.errors import ClientDisconnectedError, MethodNotAllowedError, NotFoundError, ProxyError
from xgen_proxy.forwarding.outcome import CLIENT_DISCONNECTED, Refusal
from xgen_proxy.gateway import Gateway
from xgen_proxy.reload import Reloader
from xgen_proxy.request.call import Origin
from xgen_proxy.supervision import exit_when_hung, stop, supervise
from xgen_proxy.translation.messages.errors import error_response


class ProxyApp:
    """The ASGI application. Inference routes bypass Starlette's router and middleware, which cost more than our own
    work on a small request."""

    def __init__(self, app: Starlette, gateway: Gateway) -> None:
        self.app = app
        self.gateway = gateway
        self.inference_routes = {
            **openai.inference_routes(gateway),
            **responses.inference_routes(gateway),
            **messages.inference_routes(gateway),
            **opaque_routes(gateway),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS" and await self._answer_preflight(scope, send):
            return
        endpoint = self.inference_routes.get(scope["path"])
        if endpoint is None:
            path = canonical(scope["path"])
            endpoint = self.inference_routes.get(path)
            if path != scope["path"]:
                scope = {**scope, "path": path}
        await (endpoint or self.app)(scope, receive, send)

    async def _answer_preflight(self, scope: Scope, send: Send) -> bool:
        """http_protocol.py adds the headers that other responses have too."""
        headers = dict(scope["headers"])
        if not self.gateway.settings.cors_origins or not is_preflight(headers):
            return False
        await send({"type": "http.response.start", "status": 204, "headers": preflight_headers(headers)})
        await send({"type": "http.response.body", "body": b""})
        return True

    @property
    def paths(self) -> list[str]:
        """Those without parameters."""
        routes = [route.path for route in self.app.routes if isinstance(route, Route)]
        return [path for path in (*self.inference_routes, *routes) if "{" not in path]


def create_app(settings: Settings, sources: ConfigSources | None = None) -> ProxyApp:
    """`sources`: where reloads read the settings from. Without them there are no reloads."""
    gateway = Gateway(settings)
    reloader = Reloader(gateway, sources) if sources else None

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await gateway.start()
        if reloader:
            reloader.start()
        watchdog = supervise("watchdog", exit_when_hung) if reloader else None
        yield
        if reloader:
            await reloader.stop()
        await gateway.stop()
        await stop(watchdog)

    app = Starlette(
        routes=[
            Route("/", ops.root),
            Route("/v1/models", openai.list_models),
            Route("/v1/models/{model:path}", openai.get_model),
            Route("/v1/messages/count_tokens", messages.count_tokens, methods=["POST"]),
            Route("/v1/responses/input_tokens", responses.count_input_tokens, methods=["POST"]),
            Route("/v1/responses/{id}/cancel", responses.no_such_response, methods=["POST"]),
            Route("/v1/responses/{id:path}", responses.no_such_response, methods=["GET", "DELETE"]),
            Route("/generate", GenerateEndpoint(gateway, always_streams=False), methods=["POST"]),
            Route("/generate/stream", GenerateEndpoint(gateway, always_streams=True), methods=["POST"]),
            Route("/route", ops.route, methods=["POST"]),
            Route("/health", ops.health),
            Route("/ready", ops.ready),
            Route("/models/status", ops.status),
            Route("/metrics", ops.metrics),
            Route("/openapi.json", openapi),
            Route("/docs", docs),
        ],
        exception_handlers={
            ProxyError: respond_with_error,
            HTTPException: respond_with_http_error,
            ClientDisconnectedError: ignore_disconnect,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # ProxyApp serves such paths
    app.state.gateway = gateway
    front = ProxyApp(app, gateway)
    app.state.paths = front.paths
    return front


async def respond_with_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProxyError):
        raise error
    gateway: Gateway = request.app.state.gateway
    request_headers = dict(request.scope["headers"])
    client = client_address(request.scope, gateway.settings.trusted_proxies)
    origin = Origin(request_id(request_headers), request_headers, client)
    gateway.observer.request_refused(Refusal(origin, "other", error))
    headers = {name.decode(): value.decode() for name, value in error.headers()} | {"x-request-id": origin.request_id}
    if messages.expects_anthropic(request):
        status, body = error_response(error, origin.request_id)
        return Response(body, status, {**headers, "request-id": origin.request_id})
    return Response(error.body(), error.status, headers)


async def respond_with_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape."""
    if not isinstance(error, HTTPException):
        raise error
    path, method = request.scope["path"][:200], request.method
    if error.status_code == 405:
        allowed = (error.headers or {})["Allow"]
        return await respond_with_error(request, MethodNotAllowedError(path, method, allowed))
    route = similar(path, request.app.state.paths)
    where = f"did you mean {route}?" if route else "the API is under /v1, such as /v1/chat/completions"
    return await respond_with_error(request, NotFoundError(f"there is nothing at {path}; {where}"))


async def ignore_disconnect(request: Request, error: Exception) -> Response:
    """The client disconnected while it sent its body. This response goes nowhere; the status is for logs."""
    return Response(status_code=CLIENT_DISCONNECTED)
