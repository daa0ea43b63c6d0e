"""An error about a part of the chat names what the client wrote."""

from __future__ import annotations

from typing import Any

import pytest

from xgen_proxy.errors import BadRequestError
from xgen_proxy.translation.media_part import MediaPart, in_clients_words

PART = MediaPart({"type": "image_url", "image_url": {"url": "x"}}, "input.3.output.0.image_url")
CHAT: dict[str, Any] = {"messages": [{"content": "Hi"}, {"content": [{"type": "text", "text": "a"}, PART]}]}


@pytest.mark.parametrize("field", ["messages.1.content.1.image_url.url", "messages.1.content.1"])
def test_an_error_about_a_part_names_the_clients_field(field: str) -> None:
    error = in_clients_words(BadRequestError(f"{field} is no image", param=field), CHAT)
    assert (error.message, error.param) == ("input.3.output.0.image_url is no image", "input.3.output.0.image_url")


OTHERS = [
    None,
    "",
    "model",
    "messages",
    "messages.1.content.0.text",
    "messages.7",
    "messages.x",
    "messages.0.content.1",
]


@pytest.mark.parametrize("field", OTHERS)
def test_other_errors_stay_as_they_are(field: str | None) -> None:
    error = BadRequestError("no", param=field)
    assert in_clients_words(error, CHAT) is error
