"""What an answer's last bytes tell of it, without parsing the rest. Pure."""

from __future__ import annotations

import re

USAGE = b'"usage":'  # inside a JSON string its quotes would be escaped
FROM_END = 1500  # bytes: what engines write after the counts is short, and none of it grows with the answer
PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
COMPLETION = re.compile(rb'"completion_tokens": ?(\d+)')
FINISH = re.compile(rb'"finish_reason": ?"(\w+)"')

Usage = tuple[int, int]  # tokens of the prompt and of the answer


def usage_at_end(data: bytes) -> Usage | None:
    """`data`: a whole answer, or the last events of a stream."""
    at = data.rfind(USAGE, -FROM_END)
    prompt = PROMPT.search(data, at) if at >= 0 else None
    if prompt is None:
        return None
    completion = COMPLETION.search(data, at)  # embeddings have none
    return int(prompt[1]), int(completion[1]) if completion else 0


def finish_reasons(data: bytes) -> list[str]:
    """Of the choices that end there."""
    return [reason.decode() for reason in FINISH.findall(data, max(len(data) - FROM_END, 0))]
