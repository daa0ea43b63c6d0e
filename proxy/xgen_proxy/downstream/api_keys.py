"""API keys: kept as SHA-256, compared in constant time. Keys are random and long, so that a plain hash is enough."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence

from xgen_proxy.errors import AuthenticationError


def new_key() -> tuple[str, str]:
    """(the key for the client, the hash for `api_keys`)."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    return key, hash_key(key)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def check_key(headers: Mapping[bytes, bytes], hashes: Sequence[str]) -> str | None:
    """Returns what logs may call the key: the first 8 digits of its hash. With no keys configured everybody may come
    in, as None. Raises AuthenticationError."""
    if not hashes:
        return None
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    given = hashlib.sha256(key.strip()).hexdigest()
    known = [hmac.compare_digest(given, each) for each in hashes]  # all of them: the time must not tell which
    if scheme.lower() != b"bearer" or not any(known):
        raise AuthenticationError("send a valid API key, as in Authorization: Bearer sk-…")
    return given[:8]
