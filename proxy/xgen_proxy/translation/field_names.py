"""Errors about a field of the chat, in terms of the field that the client wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping

from xgen_proxy.request.features import Json


def renamed(error: Json, names: Mapping[str, str]) -> Json:
    """The fields of an OpenAI error, with the client's name of the parameter that it is about, also where the message
    begins with it. `names`: those of the chat → the client's."""
    param = error.get("param")
    if not isinstance(param, str) or param not in names:
        return error
    message = error.get("message")
    if isinstance(message, str):
        message = re.sub(rf"^((?:the schema in )?){re.escape(param)}\b", rf"\g<1>{names[param]}", message)
    return {**error, "param": names[param], "message": message}
