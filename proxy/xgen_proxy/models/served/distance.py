"""The distance between what two engines say, from the most likely next tokens that each of them names.

An engine's HTTP API names the top 20 tokens of 50,000 or more. The tokens that both name are compared one by one, and
all others as one further token, the rest:

    KLD >= sum over named tokens of p ln(p/q) + (1 - P) ln((1 - P) / (1 - Q)),  P and Q: the mass of the named tokens

By the log sum inequality joining tokens can only lower a divergence, so that the figure is a lower bound of the
divergence over the whole vocabulary. https://en.wikipedia.org/wiki/Log_sum_inequality
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from xgen_proxy.values import frozen

LEAST = 1e-6  # a rest: engines round what they name


@frozen
class Likely:
    """A likely next token. `id`: None where the engine tells only its text."""

    id: int | None
    text: str
    logprob: float


Distribution = Sequence[Likely]  # of the next token at one position


@frozen
class Position:
    """`same_top`: both prefer the same token; None if their names cannot tell. `kld`: of the second from the first,
    in nats, at least. `named`: the mass of the first that both name."""

    same_top: bool | None
    kld: float
    named: float


def compare(first: Distribution, second: Distribution) -> Position:
    """Where two tokens tie for the top, either counts: bf16 logits are so coarse that this happens."""
    by_id = all(each.id is not None for each in (*first, *second))
    name: Callable[[Likely], Hashable] = (lambda each: each.id) if by_id else (lambda each: each.text)
    unclear = set() if by_id else _unclear(first) | _unclear(second)
    p = {name(each): each.logprob for each in first if each.text not in unclear}
    q = {name(each): each.logprob for each in second if each.text not in unclear}
    same = None
    if by_id or not unclear:  # else one unclear name may stand for several tokens, and hide the top one
        same = not {name(each) for each in _top(first)}.isdisjoint(name(each) for each in _top(second))
    return Position(same, *_divergence(p, q))


def _unclear(distribution: Distribution) -> set[str]:
    """Texts that more than one token has, or that are part of a character."""
    count = Counter(each.text for each in distribution)
    return {text for text, times in count.items() if times > 1 or not text or "\N{REPLACEMENT CHARACTER}" in text}


def _top(distribution: Distribution) -> list[Likely]:
    best = max(each.logprob for each in distribution)
    return [each for each in distribution if each.logprob == best]


def _divergence(p: Mapping[Hashable, float], q: Mapping[Hashable, float]) -> tuple[float, float]:
    both = p.keys() & q.keys()
    named_p, named_q = (sum(math.exp(each[key]) for key in both) for each in (p, q))
    rest_p, rest_q = max(1 - named_p, LEAST), max(1 - named_q, LEAST)
    kld = sum(math.exp(p[key]) * (p[key] - q[key]) for key in both) + rest_p * math.log(rest_p / rest_q)
    return max(kld, 0.0), min(named_p, 1.0)


@frozen
class Figures:
    """Averages over many positions. `undecided` counts the positions at which a top token ties with another. `top1`
    excludes them; it is None if most positions are undecided."""

    positions: int
    undecided: int
    top1: float | None
    top1_se: float
    kld: float
    kld_se: float
    named: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "positions": self.positions,
            "undecided": self.undecided,
            "top1": None if self.top1 is None else round(self.top1, 6),
            "top1_se": round(self.top1_se, 6),
            "kld_at_least": round(self.kld, 6),
            "kld_se": round(self.kld_se, 6),
            "named_mass": round(self.named, 6),
        }


def figures(positions: Sequence[Position]) -> Figures:
    """Standard errors by position. There is at least one."""
    decided = [each.same_top for each in positions if each.same_top is not None]
    top1 = fmean(decided) if len(decided) * 2 >= len(positions) else None
    klds = [each.kld for each in positions]
    return Figures(
        positions=len(positions),
        undecided=len(positions) - len(decided),
        top1=top1,
        top1_se=0.0 if top1 is None else math.sqrt(top1 * (1 - top1) / len(decided)),
        kld=fmean(klds),
        kld_se=stdev(klds) / math.sqrt(len(klds)) if len(klds) > 1 else 0.0,
        named=fmean(each.named for each in positions),
    )
