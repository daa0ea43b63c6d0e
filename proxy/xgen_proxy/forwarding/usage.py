"""Token usage and finish reasons, read from a response's last bytes without parsing the rest."""

from __future__ import annotations

import re

USAGE = b'"usage":'  # inside a JSON string the quotes would be escaped
TAIL = 1500  # bytes: what engines write after the counts is short and does not grow with the answer
PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
COMPLETION = re.compile(rb'"completion_tokens": ?(\d+)')
FINISH = re.compile(rb'"finish_reason": ?"(\w+)"')

Usage = tuple[int, int]  # prompt tokens, completion tokens


def usage_at_end(data: bytes) -> Usage | None:
    """`data` is a whole response, or the last events of a stream. None if it has no usage."""
    at = data.rfind(USAGE, -TAIL)
    prompt = PROMPT.search(data, at) if at >= 0 else None
    if prompt is None:
        return None
    completion = COMPLETION.search(data, at)  # embeddings have none
    return int(prompt[1]), int(completion[1]) if completion else 0


def finish_reasons(data: bytes) -> list[str]:
    """The finish reasons near the end of `data`, in order."""
    return [reason.decode() for reason in FINISH.findall(data, max(len(data) - TAIL, 0))]
