"""Paths as people type them: with a slash or a /v1 too many or too few."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 300  # characters of a path that is looked at
SLASHES = re.compile("/{2,}")
WITHOUT_V1 = frozenset({
    "/chat/completions", "/completions", "/embeddings", "/models", "/responses",
    "/rerank", "/score", "/audio/transcriptions", "/audio/translations",
})  # fmt: skip
OTHER_NAMES = {  # of engines, for the same
    "/v2/rerank": "/v1/rerank",  # Cohere's, and vLLM's
    "/reranking": "/v1/rerank",  # llama-server's
    "/v1/reranking": "/v1/rerank",
    "/v1/classify": "/classify",
    "/v1/tokenize": "/tokenize",
    "/v1/detokenize": "/detokenize",
}


def canonical(path: str) -> str:
    """The path that is meant, where that is unambiguous; else `path` itself."""
    if len(path) > LONGEST:
        return path
    path = SLASHES.sub("/", path)
    while path.startswith("/v1/v1/"):
        path = path[3:]
    path = path.rstrip("/") or "/"
    return f"/v1{path}" if path in WITHOUT_V1 else OTHER_NAMES.get(path, path)


def similar(path: str, routes: Iterable[str]) -> str | None:
    """The route that `path` may mean: the one it ends with, such as /api/v1/models, or one that is spelled alike."""
    path = canonical(path[-LONGEST:].lower())
    for route in sorted(routes, key=len, reverse=True):
        if route != "/" and path.endswith((route, route.removeprefix("/v1"))):
            return route
    close = get_close_matches(path[:60], routes, 1, 0.8)
    return close[0] if close else None
