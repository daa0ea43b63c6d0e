"""Token usage and finish reasons, read from a response's last bytes without parsing the rest."""

from __future__ import annotations

import re

USAGE = b'"usage":'  # inside a JSON string the quotes would be escaped
TAIL = 1500  # bytes: what engines write after the counts is short and does not grow with the answer
TOKENS = re.compile(rb'"(prompt|completion)_tokens": ?(\d+)')
FINISH = re.compile(rb'"finish_reason": ?"(\w+)"')

Usage = tuple[int, int]  # prompt tokens, completion tokens


def usage_at_end(data: bytes) -> Usage | None:
    """`data` is a whole response, or the last events of a stream. None if it has no usage."""
    at = data.rfind(USAGE, -TAIL)
    counts = dict(TOKENS.findall(data, at)) if at >= 0 else {}
    if b"prompt" not in counts:
        return None
    return int(counts[b"prompt"]), int(counts.get(b"completion", 0))  # embeddings have no completion


def finish_reasons(data: bytes) -> list[str]:
    """The finish reasons near the end of `data`, in order."""
    return [reason.decode() for reason in FINISH.findall(data, max(len(data) - TAIL, 0))]
