"""Which address a request comes from, for the log: the peer's, or, where that is a trusted proxy, whom it forwards for.

X-Forwarded-For grows to the right, and what is left of the last address that no trusted proxy wrote is the client's own
invention: https://developer.mozilla.org/docs/Web/HTTP/Reference/Headers/X-Forwarded-For
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address, ip_network

from starlette.types import Scope

LONGEST = 45  # characters of an IPv6 address that ends with an IPv4 one


def client_address(scope: Scope, trusted: tuple[str, ...]) -> str | None:
    """`trusted`: networks, as 10.0.0.0/8. None where the connection has no address."""
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
    """What follows a % is free text, and no log is the place for that."""
    if len(text) > LONGEST or "%" in text:
        return False
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=4096)
def _is_trusted(address: str, networks: tuple[str, ...]) -> bool:
    ip = ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip  # as a socket for both families shows IPv4
    return any(ip in ip_network(network) for network in networks)
