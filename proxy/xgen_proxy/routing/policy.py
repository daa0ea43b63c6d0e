"""decide(): which replicas may serve a request, in which order, and why. Pure: no I/O, no clock, no hidden randomness.

1. An explicit backend wins.
2. GPU up and (prompt > 100 words or max_tokens > 1024): GPU; when it is full, long work waits for it.
3. Urgency high: GPU while its load < 0.7, else CPU.
4. Otherwise GPU if it is up, else CPU.
5. Load is the worst of in-flight, waiting and KV usage (fleet/load.py).
6. Short work goes to the CPU while the GPU is at or over its load limit.
7. A backend must be able to do the request: model, capabilities, context length.
8. Within a backend: the replica where the session, or a prompt that begins alike, is at home and so in the cache, but
   not one that has more than its share to do; else the less loaded of the two with the fewest requests of ours.
9. The others, in order, are the fallback plan; the CPU is last and always there, unless `fallback: none`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from xgen_proxy.config.settings import Routing
from xgen_proxy.errors import BadRequestError, ProxyError, ServiceUnavailableError
from xgen_proxy.request.features import PROMPT_FIELD, Features, quoted

if TYPE_CHECKING:  # what a decision reads: name, path, models, can, context,
    # replicas, ring and in_flight; and name, up, load and in_flight of each
    from xgen_proxy.fleet.backend import Backend, Replica

in_flight = attrgetter("in_flight")

WINDOW = 64  # replicas to choose from; with two, several proxies make three times the queue (bench/herding.py)
SHARE = 1.25  # of what each replica would hold if all held the same; the paper's trade of balance for staying at home
WALK = 8  # replicas along the ring: of those that are no further, one can nearly always take it
PREFIX_WORDS = 50  # of a shorter prompt there is little in a cache: vLLM keeps blocks of 16 tokens
ESTIMATE_MARGIN = 2.0  # a prompt is called too long only if half of its estimated tokens would still be too many


@dataclass(slots=True, eq=False)
class Candidate:
    """Candidates of one `tier` are equally right: the first with a free slot takes the request. The next tier is for
    failures only: full replicas of an earlier tier are waited for."""

    backend: Backend
    replica: Replica
    reason: str
    tier: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """A backend that the request cannot go to. `code`: OpenAI's word for it, where it has one."""

    name: str
    reason: str
    code: str | None = None


@dataclass(slots=True)
class Plan:
    """`error` says why, where there is no candidate."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    error: ProxyError | None = None


def decide(features: Features, backends: Sequence[Backend], routing: Routing, rng: random.Random) -> Plan:
    """`features.model` is set and some backend serves it. Never raises; a plan without candidates has an error."""
    able, rejections = _able(features, backends)
    error = _explicit_error(features, backends, able, rejections)
    if error is not None:
        return Plan((), tuple(rejections), error)
    if not able:
        return Plan((), tuple(rejections), _unable_error(features, backends, rejections))
    picks = {backend.name: _pick(features, backend, routing.max_attempts, rng) for backend in able}
    rejections += [Rejection(backend.name, "no replica is up") for backend in able if not picks[backend.name].replicas]
    live = [backend for backend in able if picks[backend.name].replicas]
    ranked = _rank(features, live, picks, routing)
    if not features.fallback:
        ranked = ranked[:1]
    if not ranked:
        return Plan((), tuple(rejections), _down_error(features, rejections))
    return Plan(_candidates(ranked, picks, routing.max_attempts), tuple(rejections))


# rule 7: who is able


def _able(features: Features, backends: Sequence[Backend]) -> tuple[list[Backend], list[Rejection]]:
    able: list[Backend] = []
    rejections: list[Rejection] = []
    for backend in sorted(backends, key=_rank_of_path):
        rejection = _inability(features, backend)
        if rejection is None:
            able.append(backend)
        else:
            rejections.append(rejection)
    return able, rejections


def _rank_of_path(backend: Backend) -> tuple[bool, str]:
    return backend.device_class != "gpu", backend.name


def _inability(features: Features, backend: Backend) -> Rejection | None:
    if features.model not in backend.models:
        return Rejection(backend.name, f"does not serve {features.model!r}")
    missing = features.needs - backend.capabilities
    if missing:
        return Rejection(backend.name, f"cannot do {', '.join(sorted(missing))}")
    if backend.context is not None and features.prompt_tokens / ESTIMATE_MARGIN > backend.context:
        why = f"prompt of about {features.prompt_tokens} tokens exceeds its context of {backend.context}"
        return Rejection(backend.name, why, "context_length_exceeded")
    return None


def _explicit_error(
    features: Features, backends: Sequence[Backend], able: list[Backend], rejections: list[Rejection]
) -> ProxyError | None:
    """An explicit backend that is not there, or that can never do the request, is the client's mistake."""
    if features.backend is None or any(backend.name == features.backend for backend in able):
        return None
    for rejection in rejections:
        if rejection.name == features.backend:
            too_long = _too_long(features, rejection)
            return too_long or BadRequestError(f"backend {rejection.name} {rejection.reason}", param="backend")
    names = ", ".join(sorted(backend.name for backend in backends))
    return BadRequestError(
        f"there is no backend {quoted(features.backend)}; choose auto or one of {names}", param="backend"
    )


def _unable_error(features: Features, backends: Sequence[Backend], rejections: list[Rejection]) -> ProxyError:
    for rejection in rejections:
        if error := _too_long(features, rejection):
            return error
    reasons = "; ".join(f"{rejection.name} {rejection.reason}" for rejection in rejections)
    return BadRequestError(f"no backend can do this request: {reasons}")


def _too_long(features: Features, rejection: Rejection) -> ProxyError | None:
    if rejection.code is None:
        return None
    return BadRequestError(
        f"{rejection.name}: {rejection.reason}; shorten the prompt",
        param=PROMPT_FIELD[features.endpoint],
        code=rejection.code,
    )


def _down_error(features: Features, rejections: list[Rejection]) -> ProxyError:
    reasons = "; ".join(f"{rejection.name}: {rejection.reason}" for rejection in rejections)
    return ServiceUnavailableError(f"no backend that can do this request is up now ({reasons})", retry_after=5)


# rule 8: which replicas


class Pick(NamedTuple):
    """`why` is said of the first replica, where there was a choice."""

    replicas: list[Replica]
    why: str = ""


def _pick(features: Features, backend: Backend, most: int, rng: random.Random) -> Pick:
    """Up to `most` live replicas, two at least to choose from: the home first, then the less loaded of two."""
    if len(backend.replicas) == 1:
        return Pick([each for each in backend.replicas if each.up])
    live = _draw(backend.replicas, max(most, 2), rng)
    if len(live) < 2:
        return Pick(live)
    key, what = _home_key(features)
    home = _home(backend, key) if key else None
    if home is None:
        return Pick(live, "less loaded of two")
    others = [each for each in live if each is not home]
    return Pick([home, *others][:most], f"home of its {what}")


def _draw(replicas: Sequence[Replica], most: int, rng: random.Random) -> list[Replica]:
    """Up to `most` live ones, those with the fewest requests of ours first: of all that is known that count alone is
    never old. Of the first two the less loaded one, by all that is known (https://ieeexplore.ieee.org/document/963420).

    Of many, a window at a random place is looked at; only when most of it is dead, the rest.
    """
    start = rng.randrange(len(replicas)) if replicas else 0
    turned = (*replicas[start : start + WINDOW], *replicas[: max(0, start + WINDOW - len(replicas))])[: len(replicas)]
    live = [replica for replica in turned if replica.up]
    if len(live) < most and len(turned) < len(replicas):
        live = [replica for replica in replicas if replica.up]
        rng.shuffle(live)
    live.sort(key=in_flight)
    if len(live) > 1 and live[1].load < live[0].load:
        live[0], live[1] = live[1], live[0]
    return live[:most]


def _home_key(features: Features) -> tuple[str, str]:
    if features.session:
        return features.session, "session"
    if features.prompt_words >= PREFIX_WORDS:
        return features.prefix, "prompt"
    return "", ""


def _home(backend: Backend, key: str) -> Replica | None:
    """Consistent hashing with bounded loads, https://arxiv.org/abs/1608.01350: the first on the ring that holds less
    than its share and a quarter of our requests, and is not full with those of others."""
    share = math.ceil(SHARE * (backend.in_flight + 1) / len(backend.replicas))
    for replica in islice(backend.ring.walk(key), WALK):
        if replica.up and replica.in_flight < share and replica.load < 1:
            return replica
    return None


# rules 1 to 6: in which order


Ranked = list[tuple["Backend", str, int]]  # backend, reason, tier


def _rank(features: Features, live: list[Backend], picks: dict[str, Pick], routing: Routing) -> Ranked:
    if features.backend is not None:
        chosen = [backend for backend in live if backend.name == features.backend]
        others = [backend for backend in live if backend.name != features.backend]
        if not features.fallback:
            others = []
        if not chosen:
            return _tiers([others], f"fallback: {features.backend}, which the client chose, is down")
        return _tiers([chosen, others], "explicit: the client chose it")
    gpus = [backend for backend in live if backend.device_class == "gpu"]
    cpus = [backend for backend in live if backend.device_class == "cpu"]
    if not gpus or not cpus:
        return _tiers([gpus or cpus], f"only: no {'CPU' if gpus else 'GPU'} backend is up that can do it")
    long = _long(features, routing)
    if long:
        return _tiers([gpus, cpus], long)
    loads = {backend.name: picks[backend.name].replicas[0].load for backend in gpus}
    gpus.sort(key=lambda backend: loads[backend.name])
    load = loads[gpus[0].name]
    urgent = features.urgency == "high"
    limit = routing.urgent_load if urgent else routing.load_limit
    word = "urgent" if urgent else "default"
    if load < limit:
        return _tiers([gpus + cpus], f"{word}: GPU load {load:.2f} < {limit:g}")
    return _tiers([cpus + gpus], f"{word}_spill: GPU load {load:.2f} >= {limit:g}")


def _long(features: Features, routing: Routing) -> str | None:
    if features.prompt_words > routing.long_prompt_words:
        return f"long_prompt: {features.prompt_words} words > {routing.long_prompt_words}"
    if (features.max_tokens or 0) > routing.long_max_tokens:
        return f"long_output: max_tokens {features.max_tokens} > {routing.long_max_tokens}"
    return None


def _tiers(tiers: list[list[Backend]], reason: str) -> Ranked:
    """The first backend carries the reason; the rest are there in case it fails or is full."""
    ranked = [(backend, tier) for tier, backends in enumerate(tiers) for backend in backends]
    first = ranked[0][0].name if ranked else ""
    return [
        (backend, reason if index == 0 else f"fallback: after {first}", tier)
        for index, (backend, tier) in enumerate(ranked)
    ]


# rule 9: the plan


def _candidates(ranked: Ranked, picks: dict[str, Pick], most: int) -> tuple[Candidate, ...]:
    """At most `most`; each backend gets one place before any gets two, so that the safety net is never crowded out."""
    if len(ranked) > most:  # the last is the safety net, but the first is the choice
        ranked = [*ranked[: most - 1], ranked[-1]] if most > 1 else ranked[:1]
    spare = most - len(ranked)
    candidates: list[Candidate] = []
    for backend, reason, tier in ranked:
        pick = picks[backend.name]
        replicas = pick.replicas[: 1 + spare]
        spare -= len(replicas) - 1
        candidates += [Candidate(backend, replica, reason, tier) for replica in replicas]
        if pick.why:
            candidates[-len(replicas)].reason += f"; {pick.why}"
    return tuple(candidates)


def explain(plan: Plan, features: Features) -> dict[str, Any]:
    """The plan as JSON, for the dry run."""
    return {
        "candidates": [
            {
                "backend": each.backend.name, "replica": each.replica.name, "device_class": each.backend.device_class,
                "load": round(each.replica.load, 4), "tier": each.tier, "reason": each.reason,
            }
            for each in plan.candidates
        ],
        "rejections": [{"name": each.name, "reason": each.reason} for each in plan.rejections],
        "error": {"status": plan.error.status, **plan.error.fields()} if plan.error else None,
        "features": {
            "endpoint": features.endpoint, "model": features.model, "prompt_words": features.prompt_words,
            "prompt_tokens_estimate": features.prompt_tokens, "max_tokens": features.max_tokens,
            "stream": features.stream, "needs": sorted(features.needs), "backend": features.backend or "auto",
            "urgency": features.urgency, "task_type": features.task_type, "fallback": features.fallback,
        },
    }  # fmt: skip
