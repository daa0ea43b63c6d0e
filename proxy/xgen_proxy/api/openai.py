"""/v1/*: OpenAI's API. https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xgen_proxy.api import messages
from xgen_proxy.api.api_keys import authenticated
from xgen_proxy.api.inference import InferenceEndpoint
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
    cards = model_cards(gateway)
    if messages.expects_anthropic(request):
        return JSONResponse(messages.models_page(cards, request.query_params))
    return JSONResponse({"object": "list", "data": cards})


def model_cards(gateway: Gateway) -> list[dict[str, object]]:
    """Of the models, and of the aliases of models that are served; a pattern has one example."""
    models = gateway.fleet.models
    aliases = [
        alias_card(gateway, name, model)
        for name, model in gateway.settings.models.names().items()
        if model in models and name not in models
    ]
    return [*(model_card(gateway, name) for name in models), *aliases]


async def get_model(request: Request) -> Response:
    gateway = authenticated(request)
    name = request.path_params["model"]
    alias, models = gateway.router.find_alias(name), gateway.fleet.models
    if alias is not None and alias.model in models:
        card = alias_card(gateway, name, alias.model)
    elif name in models:
        card = model_card(gateway, name)
    else:
        known = ", ".join(models[:20]) or "none yet"
        raise ModelNotFoundError(f"the model {quoted(name)} does not exist; known models: {known}", param="model")
    return JSONResponse(messages.model_info(card) if messages.expects_anthropic(request) else card)


def model_card(gateway: Gateway, name: str) -> dict[str, object]:
    """`max_model_len` is vLLM's name for the context in tokens, `context_length` OpenRouter's; left out if unknown.

    A request fits every backend that serves the model if it fits the smallest context. One of them has each capability.
    """
    owners = [backend for backend in gateway.fleet.backends if name in backend.models]
    contexts = [backend.context for backend in owners if backend.context]
    context = {"max_model_len": min(contexts), "context_length": min(contexts)} if contexts else {}
    return {
        "id": name,
        "object": "model",
        "created": gateway.started,
        "owned_by": "xgen-proxy",
        "backends": [backend.name for backend in owners],
        **context,
        "capabilities": sorted(set().union(*(backend.capabilities for backend in owners))),
    }


def alias_card(gateway: Gateway, name: str, model: str) -> dict[str, object]:
    """That of the model, under the name of the alias."""
    return {**model_card(gateway, model), "id": name, "alias_of": model}
