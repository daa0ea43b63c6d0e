"""/v1/*: OpenAI's API. https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xgen_proxy.api.inference import InferenceEndpoint
from xgen_proxy.downstream.api_keys import check_key
from xgen_proxy.errors import ModelNotFoundError, quoted
from xgen_proxy.gateway import Gateway


def inference_routes(gateway: Gateway) -> dict[str, InferenceEndpoint]:
    """By path."""
    return {
        "/v1/chat/completions": InferenceEndpoint(gateway, "chat"),
        "/v1/completions": InferenceEndpoint(gateway, "completions"),
        "/v1/embeddings": InferenceEndpoint(gateway, "embeddings"),
    }


async def list_models(request: Request) -> Response:
    gateway = authenticated(request)
    return JSONResponse({"object": "list", "data": [model_card(gateway, name) for name in gateway.fleet.models]})


async def get_model(request: Request) -> Response:
    gateway = authenticated(request)
    name = request.path_params["model"]
    if name not in gateway.fleet.models:
        known = ", ".join(gateway.fleet.models[:20]) or "none yet"
        raise ModelNotFoundError(f"the model {quoted(name)} does not exist; known models: {known}", param="model")
    return JSONResponse(model_card(gateway, name))


def authenticated(request: Request) -> Gateway:
    """The gateway, once the API key is checked. Raises AuthenticationError."""
    gateway: Gateway = request.app.state.gateway
    check_key(dict(request.scope["headers"]), gateway.settings.api_keys)
    return gateway


def model_card(gateway: Gateway, name: str) -> dict[str, object]:
    owners = [backend.name for backend in gateway.fleet.backends if name in backend.models]
    return {"id": name, "object": "model", "created": gateway.started, "owned_by": "xgen-proxy", "backends": owners}
