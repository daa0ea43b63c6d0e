"""API keys, stored as SHA-256 and compared in constant time. Keys are long and random, so a plain hash is enough."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence

from starlette.requests import Request

from xgen_proxy.errors import AuthenticationError
from xgen_proxy.gateway import Gateway


def new_key() -> tuple[str, str]:
    """(the key for the client, its hash for `api_keys`)."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    return key, hash_key(key)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def check_key(headers: Mapping[bytes, bytes], hashes: Sequence[str] | None) -> str | None:
    """Return the first 8 digits of the key's hash, which is how logs name the key.

    The key is a bearer token, or in X-Api-Key, as Anthropic's clients send it. Of both, one valid key is enough: Claude
    Code sends a key of its own beside the token that a gateway was given.
    `hashes`: those of the valid keys, or the setting's word `none`, or None where it is unset; then every request is
    accepted, and None returned. An empty sequence has no valid key. Raises AuthenticationError.
    """
    if hashes is None or hashes == "none":
        return None
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    keys = [token] if scheme.lower() == b"bearer" else []
    if other := headers.get(b"x-api-key"):
        keys.append(other)
    valid = [given for key in keys if _is_valid(given := hashlib.sha256(key.strip()).hexdigest(), hashes)]
    if not valid:
        raise AuthenticationError("send a valid API key, as in Authorization: Bearer sk-… or X-Api-Key: sk-…")
    return valid[0][:8]


def authenticated(request: Request) -> Gateway:
    """The gateway, once the API key is checked. Raises AuthenticationError."""
    gateway: Gateway = request.app.state.gateway
    check_key(dict(request.scope["headers"]), gateway.settings.api_keys)
    return gateway


def _is_valid(given: str, hashes: Sequence[str]) -> bool:
    """Compares with every hash, so that the time does not reveal which one matches."""
    matches = [hmac.compare_digest(given, each) for each in hashes]
    return any(matches)
