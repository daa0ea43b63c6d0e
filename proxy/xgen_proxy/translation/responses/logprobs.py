"""The probabilities of an answer's tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from xgen_proxy.request.features import Json
from xgen_proxy.translation.chat import Answer

MOST_PLACES = 10  # each costs a search through the whole answer


def output_logprobs(logprobs: Iterable[Json]) -> list[Json]:
    """Those of a chat, without the engine's own fields; llama-cpp-python has null for the bytes."""
    return [
        {**_token(each), "top_logprobs": [_token(top) for top in each.get("top_logprobs") or ()]} for each in logprobs
    ]


def _token(logprob: Json) -> Json:
    token = logprob.get("token") or ""
    spelt = logprob.get("bytes")
    return {
        "token": token,
        "bytes": list(token.encode(errors="replace")) if spelt is None else spelt,
        "logprob": logprob.get("logprob"),
    }


def logprobs_of_text(answer: Answer) -> Sequence[Json]:
    """Those of the tokens of `answer.text`. vLLM has the tokens of thoughts and calls among them.

    If the text is not found, because tokens are named by their ids or have halves of a character, a mere text keeps
    all; beside thoughts or calls none are kept.
    """
    pieces = [_spelling(each) for each in answer.logprobs]
    text = answer.text.encode(errors="replace")
    for wanted in (text, answer.text.strip().encode(errors="replace")):  # vLLM strips some texts
        if wanted and (run := _last_run(pieces, wanted)):
            return answer.logprobs[run]
    return () if answer.reasoning or answer.tool_calls else answer.logprobs


def _spelling(logprob: Json) -> bytes:
    """A token's bytes, since a character may be spread over several tokens."""
    spelt, token = logprob.get("bytes"), logprob.get("token")
    try:
        if isinstance(spelt, list):
            return bytes(spelt)
    except (TypeError, ValueError):  # no bytes
        pass
    return token.encode(errors="replace") if isinstance(token, str) else b""


def _last_run(pieces: Sequence[bytes], wanted: bytes) -> slice | None:
    """The last run of pieces that is `wanted`, but for white space at its ends."""
    joined = b"".join(pieces)
    ends = list(accumulate(map(len, pieces)))
    for start in _places(joined, wanted):
        end = start + len(wanted)
        first, last = bisect_right(ends, start), bisect_left(ends, end)  # the pieces that have its two ends
        before = joined[ends[first] - len(pieces[first]) : start]
        after = joined[end : ends[last]]
        if not before.strip() and not after.strip():
            return slice(first, last + 1)
    return None


def _places(text: bytes, wanted: bytes) -> Iterator[int]:
    """Where `wanted` begins in `text`, the last place first. Both are reversed because find() takes linear time and
    rfind() does not. https://github.com/python/cpython/blob/main/Objects/stringlib/stringlib_find_two_way_notes.txt"""
    text, wanted, found = text[::-1], wanted[::-1], -1
    for _ in range(MOST_PLACES):
        found = text.find(wanted, found + 1)
        if found < 0:
            return
        yield len(text) - found - len(wanted)
