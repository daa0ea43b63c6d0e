"""/v1/responses: responses, counting their input tokens, and 404 for stored ones, since none is kept.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xgen_proxy.api.api_keys import authenticated
from xgen_proxy.api.inference import InferenceEndpoint
from xgen_proxy.api.translated import TranslatedEndpoint
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.errors import NotFoundError, quoted
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Origin
from xgen_proxy.translation.responses.api import ResponsesApi


def inference_routes(gateway: Gateway) -> dict[str, InferenceEndpoint]:
    """By path."""
    return {"/v1/responses": TranslatedEndpoint(gateway, ResponsesApi())}


async def count_input_tokens(request: Request) -> Response:
    """The estimate that requests are routed by. Asking an engine would need its slot."""
    gateway = authenticated(request)
    headers = dict(request.scope["headers"])
    origin = Origin(request_id(headers), headers)
    with gateway.bodies.hold() as held:
        call = (await TranslatedEndpoint(gateway, ResponsesApi()).read(origin, request.receive, held)).call
    return JSONResponse({"object": "response.input_tokens", "input_tokens": call.features.prompt_tokens})


async def no_such_response(request: Request) -> Response:
    authenticated(request)
    raise NotFoundError(
        f"there is no response {quoted(request.path_params['id'])}: this proxy keeps no responses; send the whole"
        " conversation as input to POST /v1/responses"
    )
