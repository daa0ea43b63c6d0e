"""The client's address, for the log: the peer's, or the one that a trusted proxy reports in X-Forwarded-For.

Each proxy appends to X-Forwarded-For, so only the addresses right of the last untrusted one are reliable:
https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/X-Forwarded-For
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address, ip_network

from starlette.types import Scope

MAX_LENGTH = 45  # characters of an IPv6 address that ends with an IPv4 one


def client_address(scope: Scope, trusted: tuple[str, ...]) -> str | None:
    """`trusted`: networks such as 10.0.0.0/8. Returns None if the connection has no address."""
    client = scope["client"]
    peer: str | None = client[0] if client else None
    if not trusted or peer is None or not _is_trusted(peer, trusted):
        return peer
    for name, value in reversed(scope["headers"]):
        if name == b"x-forwarded-for":
            for part in reversed(value.split(b",")):
                address = part.strip().decode("latin-1")
                if not _is_address(address):
                    return peer
                peer = address
                if not _is_trusted(peer, trusted):
                    return peer
    return peer


def _is_address(text: str) -> bool:
    """Addresses with a zone (`%…`) are rejected: the zone is free text and could carry anything into the log."""
    if len(text) > MAX_LENGTH or "%" in text:
        return False
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=4096)
def _is_trusted(address: str, networks: tuple[str, ...]) -> bool:
    ip = ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip  # a dual-stack socket reports IPv4 addresses as IPv6
    return any(ip in ip_network(network) for network in networks)
