"""The routes beside POST /v1/responses: counting input tokens, and 404 for stored responses, since none is kept."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xgen_proxy.api.openai import authenticated
from xgen_proxy.api.translated import TranslatedEndpoint, read_limited_body
from xgen_proxy.downstream.request_body import read_body
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.errors import NotFoundError, quoted
from xgen_proxy.request.call import Origin
from xgen_proxy.translation.responses.api import ResponsesApi
from xgen_proxy.translation.responses.request import read_request


async def count_input_tokens(request: Request) -> Response:
    """The estimate that requests are routed by. Asking an engine would need its slot."""
    gateway = authenticated(request)
    headers = dict(request.scope["headers"])
    limits = gateway.settings.limits
    with gateway.bodies.hold() as held:
        raw = await read_body(request.receive, headers, limits.body_bytes, held)
        chat = read_request(read_limited_body(raw, headers, limits)).body
        endpoint = TranslatedEndpoint(gateway, ResponsesApi())
        call = endpoint.parse_chat(Origin(request_id(headers), headers), chat)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": call.features.prompt_tokens})


async def no_such_response(request: Request) -> Response:
    authenticated(request)
    raise NotFoundError(
        f"there is no response {quoted(request.path_params['id'])}: this proxy keeps no responses; send the whole"
        " conversation as input to POST /v1/responses"
    )
