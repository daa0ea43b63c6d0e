"""Which remote URLs a client may give an engine to fetch: those of origins that the operator listed.

An engine fetches from inside the operator's network, so that a client who could choose the URL could read what only the
engine can reach: cloud metadata, neighbours, itself. Parsers differ, too: llama-server 0.5 takes what stands before any
`@` for a password, so that it reads `https://listed.example/@10.0.0.1/` as a request to 10.0.0.1. So a URL must be
plain; nothing in it may be read in two ways.
"""

from __future__ import annotations

import json
import re
from typing import Any

PORTS = {"http": 80, "https": 443}
HOST = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*"
ORIGIN = re.compile(rf"(https?)://(\*\.)?({HOST})(?::([1-9]\d{{0,4}}))?")
URL = re.compile(rf"(https?)://({HOST})(?::([1-9]\d{{0,4}}))?/[!-?A-\[\]-~]*", re.ASCII | re.IGNORECASE)  # no @, no \\
MAX_URL = 4096  # characters


def read_origins(value: Any) -> Any:
    """Accepts a list, also as JSON, or a string with commas. Raises ValueError for what is not an origin."""
    entries = value
    if isinstance(value, str):
        entries = json.loads(value) if value.lstrip().startswith("[") else value.split(",")
    if not isinstance(entries, (list, tuple)):
        return value
    origins = tuple(str(each).strip() for each in entries if str(each).strip())
    for origin in origins:
        found = ORIGIN.fullmatch(origin)
        if found is None or (found[2] and ("." not in found[3] or found[3].rpartition(".")[2].isdigit())):
            raise ValueError(
                f"{origin!r} is not an origin; write https://HOST, http://HOST:PORT or https://*.DOMAIN, in lower case"
                " and without a path"
            )
    return origins


def is_listed(url: str, origins: tuple[str, ...]) -> bool:
    """Whether scheme, host and port are those of an origin. `*.` stands for one name or more before a domain; an
    address must be listed as it is written."""
    found = URL.fullmatch(url) if origins and len(url) <= MAX_URL else None
    if found is None:
        return False
    scheme, host = found[1].lower(), found[2].lower()
    port = int(found[3] or PORTS[scheme])
    return any(_matches(origin, scheme, host, port) for origin in origins)


def _matches(origin: str, scheme: str, host: str, port: int) -> bool:
    found = ORIGIN.fullmatch(origin)
    if found is None or found[1] != scheme or int(found[4] or PORTS[scheme]) != port:
        return False
    return host.endswith("." + found[3]) if found[2] else host == found[3]
