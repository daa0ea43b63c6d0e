"""Content parts that know their place in the client's request, so that an error about one names the client's field."""

from __future__ import annotations

from typing import Any

from xgen_proxy.errors import BadRequestError
from xgen_proxy.request.features import Json


class MediaPart(dict[str, Any]):
    """A part of a chat message. `where`: the field that the client wrote, such as `input.0.output.1.image_url`."""

    def __init__(self, part: Json, where: str) -> None:
        super().__init__(part)
        self.where = where


def in_clients_words(error: BadRequestError, chat: Json) -> BadRequestError:
    """The error with the client's field in place of the chat's, if it is about a MediaPart of `chat`."""
    part = _part_at(chat, (error.param or "").split("."))
    if part is None or error.param is None:
        return error
    return BadRequestError(error.message.replace(error.param, part.where), param=part.where)


def _part_at(chat: Json, path: list[str]) -> MediaPart | None:
    """The part on the way to a field."""
    at: Any = chat
    for step in path:
        if isinstance(at, list) and step.isdecimal() and int(step) < len(at):
            at = at[int(step)]
        elif isinstance(at, dict):
            at = at.get(step)
        else:
            return None
        if isinstance(at, MediaPart):
            return at
    return None
