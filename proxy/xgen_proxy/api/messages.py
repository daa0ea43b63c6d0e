"""/v1/messages, /v1/messages/count_tokens and the list of models: Anthropic's API. https://docs.claude.com/en/api"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from xgen_proxy.api.api_keys import check_key
from xgen_proxy.api.inference import InferenceEndpoint
from xgen_proxy.api.translated import TranslatedEndpoint
from xgen_proxy.downstream.client_address import client_address
from xgen_proxy.downstream.request_id import request_id
from xgen_proxy.errors import BadRequestError, ServiceUnavailableError, UpstreamError
from xgen_proxy.forwarding.delivery import backend_request
from xgen_proxy.gateway import Gateway
from xgen_proxy.request.call import Call, Origin
from xgen_proxy.request.parsing import GENERATION
from xgen_proxy.routing.router import Target
from xgen_proxy.translation.messages.api import MessagesApi

COUNT_TIMEOUT_S = 5.0  # an estimate now is worth more than the exact number later
FAR_TOO_LONG = 8  # times the context, by estimate
MAX_MODELS = 1000  # on one page, as in Anthropic's API
MODELS = 20


def inference_routes(gateway: Gateway) -> dict[str, InferenceEndpoint]:
    """By path."""
    return {"/v1/messages": TranslatedEndpoint(gateway, MessagesApi(lambda: gateway.settings.strip_attribution))}


def expects_anthropic(request: Request) -> bool:
    """Whether the client expects Anthropic's shapes on a route that both APIs have."""
    headers = dict(request.scope["headers"])
    return bool(headers.get(b"anthropic-version")) or request.scope["path"].startswith("/v1/messages")


# -- counting ----------------------------------------------------------------------------------------------------------


async def count_tokens(request: Request) -> Response:
    """Exact where a replica can count. It takes no slot."""
    gateway: Gateway = request.app.state.gateway
    headers = dict(request.scope["headers"])
    settings = gateway.settings
    key = check_key(headers, settings.api_keys)
    origin = Origin(request_id(headers), headers, client_address(request.scope, settings.trusted_proxies), key)
    api = MessagesApi(lambda: settings.strip_attribution, counts=True)
    with gateway.bodies.hold() as held:
        call = (await TranslatedEndpoint(gateway, api).read(origin, request.receive, held)).call
        counted = await _count(gateway, call)
    ids = {"x-request-id": call.id, "request-id": call.id}
    return JSONResponse({"input_tokens": call.features.prompt_tokens if counted is None else counted}, headers=ids)


async def _count(gateway: Gateway, call: Call) -> int | None:
    """None if no replica that is up can tell. Raises BadRequestError, such as ModelNotFoundError."""
    # Neither the length of the prompt nor what the answer needs is a reason not to count.
    anywhere = replace(call.features, prompt_tokens=0, prompt_words=0, needs=GENERATION)
    try:
        targets = gateway.router.targets(gateway.router.plan(anywhere))
        return await _ask(call, targets[0]) if targets else None
    except (ServiceUnavailableError, UpstreamError):
        return None


async def _ask(call: Call, target: Target) -> int | None:
    """None too if the prompt is far too long for the model, or if the replica counts several others."""
    context = target.backend.context
    if context is not None and call.features.prompt_tokens > FAR_TOO_LONG * context:
        return None

    async def post(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return await target.replica.post_json(path, body, COUNT_TIMEOUT_S)

    with target.replica.counting() as may_count:
        return await target.backend.dialect.count_chat(backend_request(call, target), post) if may_count else None


# -- models ------------------------------------------------------------------------------------------------------------


def models_page(cards: list[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """`cards` are those of OpenAI's list. Raises BadRequestError."""
    limit = query.get("limit", str(MODELS))
    if not limit.isdecimal() or len(limit) > 9 or not 1 <= int(limit) <= MAX_MODELS:
        raise BadRequestError(f"limit must be between 1 and {MAX_MODELS}", param="limit")
    names = [card["id"] for card in cards]
    after = query.get("after_id")
    start = names.index(after) + 1 if after in names else 0
    page = cards[start : start + int(limit)]
    return {
        "data": [model_info(card) for card in page],
        "has_more": start + len(page) < len(cards),
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


def model_info(card: dict[str, Any]) -> dict[str, Any]:
    created = datetime.fromtimestamp(card["created"], UTC)
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": card.get("context_length"),
    }
