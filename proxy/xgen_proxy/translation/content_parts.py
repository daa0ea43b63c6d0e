"""The parts of a chat message's content."""

from __future__ import annotations

from xgen_proxy.request.features import Json


def as_part(text: str) -> Json:
    return {"type": "text", "text": text}


def as_content(parts: list[Json]) -> str | list[Json]:
    """One text if all parts are texts, since some templates take nothing else. Empty texts are left out."""
    kept = [part for part in parts if part["type"] != "text" or part["text"]]
    if all(part["type"] == "text" for part in kept):
        return "\n".join(part["text"] for part in kept)
    return kept
