"""The attribution block of Claude Code: the first text of its system prompt, which changes with every request.

    x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=sdk-cli; cch=36ee5;

An engine's prefix cache ends at the first token that differs, so that this block makes it read the whole conversation
again for each request: https://github.com/anthropics/claude-code/issues/68900
"""

from __future__ import annotations

import re

MARK = "x-anthropic-billing-header:"
# The header with its `name=value;` pairs. What follows them on the line belongs to the prompt.
PAIRS = re.compile(re.escape(MARK) + r"(?:[ \t]*[\w-]+=[^;\s]*(?:;|(?=\s)|\Z))+[ \t]*\n?")
LONGEST = 4096  # characters; the pattern takes 0.3 s for a million
LINE = re.compile(re.escape(MARK) + r"[^\n]*\n?")


def without_attribution(texts: list[str]) -> list[str]:
    """The texts of a system prompt without the block, if the first begins with it. A block of one line is all header,
    whatever its format."""
    if not texts or not texts[0].startswith(MARK):
        return texts
    first, *others = texts
    head, tail = first[:LONGEST], first[LONGEST:]
    alone = bool(others) and "\n" not in first.strip()
    rest = "" if alone else (PAIRS if PAIRS.match(head) else LINE).sub("", head, count=1) + tail
    return [rest, *others] if rest.strip() else others
