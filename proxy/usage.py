"""How many tokens an answer took, found at its end without parsing the rest. Pure."""

from __future__ import annotations

import re

from proxy.dialects import Json

NAME = b'"usage":'  # inside a JSON string its quotes would be escaped
FROM_END = 1500  # bytes: what engines write after it is short, and none of it grows with the answer
PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
COMPLETION = re.compile(rb'"completion_tokens": ?(\d+)')

Usage = tuple[int, int]  # tokens of the prompt and of the answer


def usage_at_end(data: bytes) -> Usage | None:
    """Of a whole answer, or of the last events of a stream."""
    at = data.rfind(NAME, max(len(data) - FROM_END, 0))
    prompt = PROMPT.search(data, at) if at >= 0 else None
    if prompt is None:
        return None
    completion = COMPLETION.search(data, at)  # embeddings have none
    return int(prompt[1]), int(completion[1]) if completion else 0


def usage_of(answer: Json) -> Usage | None:
    usage = answer.get("usage")
    return (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None
