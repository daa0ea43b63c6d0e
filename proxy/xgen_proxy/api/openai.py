"""/v1/*: OpenAI's API. The routes that generate are plain ASGI callables, since they are hot.

https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from xgen_proxy.downstream.api_keys import check_key
from xgen_proxy.downstream.client_address import client_address
from xgen_proxy.downstream.direct_writer import DirectWriter, direct_writer_for
from xgen_proxy.downstream.disconnect import cancel_on_disconnect
from xgen_proxy.downstream.request_body import read_body, read_json
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.downstream.response_writer import send_error
from xgen_proxy.errors import (
    ClientDisconnectedError,
    InternalServerError,
    MethodNotAllowedError,
    ModelNotFoundError,
    ProxyError,
)
from xgen_proxy.forwarding.forwarder import Relay
from xgen_proxy.gateway import Call, Gateway
from xgen_proxy.observability.metrics import CLIENT_LEFT
from xgen_proxy.request.features import Endpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("xgen_proxy")


class InferenceEndpoint:
    """One POST route of OpenAI's API, from bytes to bytes."""

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self.gateway = gateway
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        id = request_id(headers)
        settings = self.gateway.settings
        client = client_address(scope, settings.trusted_proxies)
        key = None
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowedError(scope["path"], scope["method"], "POST")
            key = check_key(headers, settings.api_keys)
            call = await self.read(id, headers, receive)
        except ProxyError as error:
            await send_error(send, error, [(b"x-request-id", id.encode())])
            self.gateway.telemetry.refused(id, self.endpoint, error, client, key)
        except ClientDisconnectedError:
            pass
        else:
            call.client, call.key = client, key
            await self.answer(call, scope, receive, send)

    async def answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        await answer(self.gateway, call, receive, send, direct_writer_for(scope))

    async def read(self, id: str, headers: Mapping[bytes, bytes], receive: Receive) -> Call:
        raw = await read_body(receive, headers, self.gateway.settings.limits.body_bytes)
        return self.gateway.call(id, self.endpoint, raw, read_json(raw, headers), headers)


async def answer(gateway: Gateway, call: Call, receive: Receive, send: Send, wire: DirectWriter | None = None) -> None:
    """Plans, relays and accounts one call; stops everything when its client leaves."""
    relay: Relay | None = None
    error: ProxyError | None = None
    if gateway.tracing is not None:
        call.span = gateway.tracing.begin(call)
    try:
        relay = Relay(gateway, call, gateway.good_plan(call.features), send, wire)
        with cancel_on_disconnect(receive):
            await relay.run()
        status = relay.reply.status
    except ClientDisconnectedError:
        status = CLIENT_LEFT
    except ProxyError as known:
        error = known
    except Exception:
        log.exception("request %s", call.id)
        error = InternalServerError(f"a fault of the proxy's own; its log has {call.id}")
    if error is not None:
        status = await fail(call, relay, send, error)
    if call.span is not None:
        call.span.end(relay, status)
    if relay is not None:
        gateway.telemetry.finished(call, relay, status, error)
    elif error is not None:
        gateway.telemetry.refused(call.id, call.features.endpoint, error, call.client, call.key)


async def fail(call: Call, relay: Relay | None, send: Send, error: ProxyError) -> int:
    """As an answer, or as the last event of a stream that has begun."""
    if relay is not None and relay.reply.status:
        await send({"type": "http.response.body", "body": error.event()})
    else:
        await send_error(send, error, relay.headers() if relay else [(b"x-request-id", call.id.encode())])
    return error.status


def model_card(gateway: Gateway, name: str) -> dict[str, object]:
    owners = [backend.name for backend in gateway.fleet.backends if name in backend.models]
    return {"id": name, "object": "model", "created": gateway.started, "owned_by": "xgen-proxy", "backends": owners}


def let_in(request: Request) -> Gateway:
    """Raises AuthenticationError."""
    gateway: Gateway = request.app.state.gateway
    check_key(dict(request.scope["headers"]), gateway.settings.api_keys)
    return gateway


async def list_models(request: Request) -> Response:
    gateway = let_in(request)
    return JSONResponse({"object": "list", "data": [model_card(gateway, name) for name in gateway.fleet.models]})


async def get_model(request: Request) -> Response:
    gateway = let_in(request)
    name = request.path_params["model"]
    if name not in gateway.fleet.models:
        known = ", ".join(gateway.fleet.models[:20]) or "none yet"
        raise ModelNotFoundError(f"the model {name!r} does not exist; known models: {known}", param="model")
    return JSONResponse(model_card(gateway, name))
