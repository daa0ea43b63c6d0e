"""Measures the distance between two engines on texts: windows of each text, which both must split into the same tokens.

Whether they do is checked first. If not, a token of one is no token of the other: they serve different models, and no
figure would mean anything.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xgen_proxy.models.conditions import without_password
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.progress import Progress
from xgen_proxy.models.served.distance import Figures, Position, compare, figures
from xgen_proxy.models.served.engines import Engine
from xgen_proxy.values import frozen

AT_ONCE = 4  # windows: the slots of a llama-server that `make run` starts


class DifferentTokensError(ModelError):
    """The two serve models of different tokenizers."""


@frozen
class Window:
    text: str
    tokens: Sequence[int]


@frozen
class Result:
    all: Figures
    texts: Mapping[str, Figures]


def measure(first: Engine, second: Engine, texts: Mapping[str, str], *, tokens: int, window: int, top: int) -> Result:
    """`texts` by name; of each about `tokens` tokens are read, in windows of about `window`. Raises ModelError."""
    windows = {name: windows_of(first, second, name, text, tokens, window) for name, text in texts.items()}
    total = sum(len(each.tokens) - 1 for some in windows.values() for each in some)
    progress = Progress(f"comparing {first.name} and {second.name}", 2 * total, "positions")
    count, lock = itertools.count(1), threading.Lock()

    def tick() -> None:
        with lock:
            progress.update(next(count))

    def positions(one: Window) -> list[Position]:
        answers = [engine.distributions(one.text, one.tokens, top, tick) for engine in (first, second)]
        return [compare(a, b) for a, b in zip(*answers, strict=True) if a is not None and b is not None]

    found: dict[str, list[Position]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for name, some in windows.items():
                found[name] = list(itertools.chain.from_iterable(pool.map(positions, some)))
        finally:
            pool.shutdown(cancel_futures=True)
            progress.end()
    every = figures(list(itertools.chain.from_iterable(found.values())))
    if every.top1 is None:
        raise ModelError(
            "llama-cpp-python names tokens by their text, which parts of characters do not have, so that most positions"
            " of these texts tell nothing; serve the same file by llama-server to compare, or choose other texts"
        )
    return Result(every, {name: figures(some) for name, some in found.items()})


def windows_of(first: Engine, second: Engine, name: str, text: str, tokens: int, window: int) -> list[Window]:
    """Raises DifferentTokensError."""
    found: list[Window] = []
    count = 0
    for piece in pieces(text, window, len(first.tokens(text))):
        ours, theirs = first.tokens(piece), second.tokens(piece)
        if ours != theirs:
            raise DifferentTokensError(_difference(first, second, name, ours, theirs))
        if len(ours) > 2:  # llama-cpp-python tells nothing about the first position
            found.append(Window(piece, ours))
            count += len(ours)
        if count >= tokens:
            break
    if not found:
        raise ModelError(f"the text {name} is too short: it has {count} tokens")
    return found


def pieces(text: str, window: int, tokens: int) -> list[str]:
    """The text in pieces of about `window` tokens, cut at spaces. It has `tokens` in all."""
    size = max(1, len(text) * window // max(tokens, 1))
    found: list[str] = []
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start + size // 2, end), text.rfind("\n", start + size // 2, end))
            end = space if space > start else end
        found.append(text[start:end].strip())
        start = end
    return [piece for piece in found if piece]


def _difference(first: Engine, second: Engine, name: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    shown = [str(list(each[same : same + 3])) for each in (ours, theirs)]
    return (
        f"{first.url} and {second.url} split the text {name} into different tokens ({len(ours)} and {len(theirs)};"
        f" from number {same + 1} on {shown[0]} and {shown[1]}), so that nothing can be compared. They serve models of"
        " different families, or their tokenizers have different settings: serve files made from the same model"
    )


def described(engine: Engine, backend: str) -> dict[str, Any]:
    """One side of a result file."""
    return {
        "backend": backend,
        "url": without_password(engine.url),
        "engine": engine.name,
        "served_as": engine.model,
        **engine.details(),
    }
