"""The proxy that a client is to use: its address, its key, and the model that suits the client."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from xgen_proxy.config.settings import Settings
from xgen_proxy.errors import quoted
from xgen_proxy.values import frozen

KEY_VARIABLE = "XGEN_KEY"  # a client's key; the proxy's own setting XGEN_API_KEYS has hashes
ANY_ADDRESS = ("", "0.0.0.0", "::")  # noqa: S104  # where a proxy listens, not where it is
TIMEOUT_S = 10
AGENTS_CONTEXT = 32_000  # tokens that an agent needs; its instructions and tools alone have thousands


class LaunchError(Exception):
    """Its text is the whole message for the user: what to do. `status` is the command's exit status."""

    status = 1


class LaunchUsageError(LaunchError):
    """An argument is wrong."""

    status = 2


class UnreachableError(LaunchError):
    """No proxy answers."""


@frozen
class Model:
    """A public model name. `capabilities`: None if the server tells none, as other servers of OpenAI's API do.
    `alias_of`: the model that it stands for, if it is an alias."""

    id: str
    context: int | None = None
    capabilities: frozenset[str] | None = None
    alias_of: str | None = None

    def can(self, capability: str) -> bool:
        return self.capabilities is None or capability in self.capabilities


@frozen
class Proxy:
    """`url` is without /v1. `key`: None if there is none to send. `key_is_set`: the shell has it in XGEN_KEY; it need
    not be shown. `models`: all that generate text, as far as they are known."""

    url: str
    model: Model
    key: str | None = None
    key_is_set: bool = False
    models: tuple[Model, ...] = ()

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


def default_url() -> str:
    """The address in the settings found here; the default if they are invalid."""
    try:
        settings = Settings()
    except (ValueError, OSError):
        return "http://127.0.0.1:8080"
    host = "127.0.0.1" if settings.host in ANY_ADDRESS else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port or 8080}"


def check_url(url: str) -> str:
    """Without a slash or /v1 at its end. Raises LaunchUsageError."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:
        good = False
    if not good:
        raise LaunchUsageError(f"--url {quoted(url)} is not the address of a proxy; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def find_proxy(url: str | None, key: str | None, model: str | None, *, tools: bool) -> tuple[Proxy, str | None]:
    """(the proxy, what the user should know about it). Asks the proxy which models it has.

    `model`: None to choose one. `tools`: the client needs a model that can call them. Raises LaunchError.
    """
    url = check_url(url if url is not None else default_url())
    key_is_set = not key and bool(os.environ.get(KEY_VARIABLE))
    key = key or os.environ.get(KEY_VARIABLE) or None
    if (key and not key.isprintable()) or (model and not model.isprintable()):
        raise LaunchUsageError("a key or a model name has characters that cannot be shown; correct it")
    try:
        models = tuple(each for each in list_models(url, key) if each.can("generation"))
    except UnreachableError as error:
        if model is None:
            raise LaunchError(f"{error}; start one with `xgen-proxy serve`, or name the model with --model") from None
        return Proxy(url, Model(model), key, key_is_set), f"{error}: start it before the client"
    if model is None:
        chosen = choose(models, tools=tools)
        if chosen is None:
            raise LaunchError(
                f"the proxy at {url} has no model that writes text now; `xgen-proxy status` says why, --model names one"
            )
    else:
        chosen = next((each for each in models if each.id == model), Model(model))
    return Proxy(url, chosen, key, key_is_set, models), doubt(chosen, models, tools=tools)


def choose(models: Sequence[Model], *, tools: bool) -> Model | None:
    """The proxy lists its default model first. An agent needs tools and as long a context as there is."""
    models = [each for each in models if each.alias_of is None] or models
    if not tools:
        return next(iter(models), None)
    able = [each for each in models if each.can("tools")]
    return max(able or models, key=lambda each: each.context or 0, default=None)


def doubt(chosen: Model, models: Sequence[Model], *, tools: bool) -> str | None:
    """What may keep the client from working with this model."""
    if chosen not in models:
        known = ", ".join(each.id for each in models[:8]) or "none"
        return f"the proxy does not list the model {chosen.id} (it lists {known}); an alias may still lead to one"
    if tools and not chosen.can("tools"):
        return (
            f"no backend that serves {chosen.id} can call tools, and this client can do nothing without:"
            " see docs/clients.md for the flags of your engine"
        )
    if tools and chosen.context and chosen.context < AGENTS_CONTEXT:
        return (
            f"the context of {chosen.id} is {chosen.context:,} tokens, and agents need {AGENTS_CONTEXT:,}:"
            " see docs/clients.md for the flags of your engine"
        )
    return None


def list_models(url: str, key: str | None) -> list[Model]:
    """Raises LaunchError."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        # The context trusts what the system does, and SSL_CERT_FILE, such as the certificate of `make up`.
        trusted = ssl.create_default_context()
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=TIMEOUT_S, trust_env=False, verify=trusted)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise UnreachableError(f"no proxy answers at {url} ({error or type(error).__name__})") from None
    if response.status_code == 401:
        why = "the key is not one of its own" if key else "it asks for an API key"
        raise LaunchError(f"the proxy at {url} refuses: {why}; pass --key or set {KEY_VARIABLE}")
    try:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        return [read_model(each) for each in response.json()["data"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise LaunchError(f"the server at {url} lists no models as a proxy does ({error}); correct --url") from None


def read_model(card: Any) -> Model:
    """Raises ValueError, LookupError or TypeError for what is no model card."""
    name, context, capabilities = card["id"], card.get("max_model_len"), card.get("capabilities")
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError("a name that cannot be shown")
    return Model(
        name,
        context if isinstance(context, int) else None,
        frozenset(capabilities) if isinstance(capabilities, list) else None,
        card.get("alias_of"),
    )
