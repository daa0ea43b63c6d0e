"""decide(): which replicas may serve a request, in which order, and why. No I/O, no clock, no live objects.

1. An explicit backend wins.
2. GPU up and (prompt > 100 words or max_tokens > 1024): GPU; long work waits for a full GPU. A max_tokens that clients
   send with every request is not believed.
3. Urgency high: GPU while its load < 0.7, else CPU.
4. Otherwise GPU if it is up, else CPU.
5. Load is the worst of in-flight, waiting and KV usage (fleet/load.py).
6. Short work goes to the CPU while the GPU is at or over its load limit.
7. A backend must be able to serve the request: model, capabilities, context length.
8. Within a backend: the home replica of the session or of the prompt's prefix, which has it in its cache, unless that
   replica has more than its share of requests; else the less loaded of the two with the fewest of our requests.
9. The others follow in order as fallbacks. The CPU is last and always included, unless `fallback: none`.
10. Panic: if none of them is up, all that answer health checks count as up. To refuse would be a certain failure.
    https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/panic_threshold
11. A replica that the memory guard has closed counts as full. It comes after those that are not closed, and the CPU
    before it. It is never left out: where all are closed, each holds a little less (fleet/memory/pressure.py).
12. A backend whose model is too far from that of the reference gets nothing, or is marked. The reference is the
    explicit backend, else the first able GPU backend by name, up or not, full or not.
13. The route of an alias stands above rules 2 to 6: the GPU, as for long work, or the CPU, and the GPU while that is
    full or closed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from operator import attrgetter

from xgen_proxy.config.fallback import Nearness
from xgen_proxy.config.settings import Routing
from xgen_proxy.errors import BadRequestError, ModelTooFarError, ProxyError, ServiceUnavailableError, quoted
from xgen_proxy.fleet.snapshot import BackendSnapshot, FleetSnapshot, ReplicaSnapshot, usable_of
from xgen_proxy.request.features import PROMPT_FIELD, Features, UsedAlias
from xgen_proxy.routing.plan import Candidate, Plan, Rejection
from xgen_proxy.values import frozen

in_flight = attrgetter("in_flight")

# Replicas to choose from. With two, several proxies queue three times as long (bench/herding.py); with all of 2 x 1,000
# a decision takes five times as long.
WINDOW = 64
SHARE = 1.25  # times the mean of all replicas: the paper's trade-off between balance and staying at home
# Replicas along the ring: one of them nearly always has room. Walking the whole ring of 2 x 1,000 full replicas takes
# 9 ms, and a decision under 50 us (bench/parts.py).
WALK = 8
PREFIX_WORDS = 50  # shorter prompts hardly hit a cache: vLLM keeps blocks of 16 tokens
TOO_FAR = ModelTooFarError.code  # the error if nothing else is left
ESTIMATE_MARGIN = 2.0  # a prompt is too long only if half of its estimated tokens would still be too many


def decide(
    features: Features,
    snapshot: FleetSnapshot,
    routing: Routing,
    rng: random.Random,
    now: float,
    nearness: Nearness | None = None,
) -> Plan:
    """`features.model` is set and some backend serves it. Never raises; a plan without candidates has an error.

    `now`: seconds, on the clock of the snapshot's times.
    """
    able, rejections = _able(features, snapshot.backends)
    error: ProxyError | None = None
    if features.backend is not None:
        error = _explicit_error(features, features.backend, snapshot.backends, able, rejections)
    if error is None and not able:
        error = _unable_error(features, rejections)
    if error is not None:
        return Plan((), tuple(rejections), now, routing, error)
    marks: Mapping[str, str] = {}
    if nearness is not None and len(able) > 1:
        able, marks = _near(features, able, nearness, rejections)
    live = _options(features, able, routing, rng, now)
    ranked = _rank(features, live, routing, now)
    panic = not ranked
    if panic:
        live = _options(features, [_in_panic(backend) for backend in able], routing, rng, now)
        ranked = [
            (option, f"panic: none is up, this one answers; {reason}", tier)
            for option, reason, tier in _rank(features, live, routing, now)
        ]
    if len(live) < len(able):
        names = [option.backend.name for option in live]
        rejections += [Rejection(backend.name, "no replica is up") for backend in able if backend.name not in names]
    if not ranked:
        return Plan((), tuple(rejections), now, routing, _down_error(rejections))
    if not features.fallback:
        ranked = ranked[:1]
    candidates = _candidates(ranked, routing.max_attempts)
    if marks:
        candidates = tuple(replace(each, distance=marks.get(each.backend.name, "")) for each in candidates)
    return Plan(candidates, tuple(rejections), now, routing, panic=panic)


# rule 7: which backends can serve the request


def _able(features: Features, backends: Sequence[BackendSnapshot]) -> tuple[list[BackendSnapshot], list[Rejection]]:
    able: list[BackendSnapshot] = []
    rejections: list[Rejection] = []
    for backend in sorted(backends, key=_gpu_first):
        rejection = _inability(features, backend)
        if rejection is None:
            able.append(backend)
        else:
            rejections.append(rejection)
    return able, rejections


def _gpu_first(backend: BackendSnapshot) -> tuple[bool, str]:
    return backend.device_class != "gpu", backend.name


def _inability(features: Features, backend: BackendSnapshot) -> Rejection | None:
    if features.model not in backend.models:
        return Rejection(backend.name, f"does not serve {quoted(features.model)}")
    missing = features.needs - backend.capabilities
    if missing:
        return Rejection(backend.name, f"cannot do {', '.join(sorted(missing))}")
    if backend.context is not None and features.prompt_tokens / ESTIMATE_MARGIN > backend.context:
        reason = f"prompt of about {features.prompt_tokens} tokens exceeds its context of {backend.context}"
        return Rejection(backend.name, reason, "context_length_exceeded")
    return None


def _explicit_error(
    features: Features,
    chosen: str,
    backends: Sequence[BackendSnapshot],
    able: Sequence[BackendSnapshot],
    rejections: Sequence[Rejection],
) -> ProxyError | None:
    """An explicit backend that is not configured, or can never serve the request, is the client's mistake."""
    if any(backend.name == chosen for backend in able):
        return None
    for rejection in rejections:
        if rejection.name == chosen:
            too_long = _too_long(features, rejection)
            return too_long or BadRequestError(f"backend {rejection.name} {rejection.reason}", param="backend")
    names = ", ".join(sorted(backend.name for backend in backends))
    return BadRequestError(f"there is no backend {quoted(chosen)}; choose auto or one of {names}", param="backend")


def _unable_error(features: Features, rejections: Sequence[Rejection]) -> ProxyError:
    for rejection in rejections:
        if error := _too_long(features, rejection):
            return error
    reasons = "; ".join(f"{rejection.name} {rejection.reason}" for rejection in rejections)
    return BadRequestError(f"no backend can do this request with the model {quoted(features.model)}: {reasons}")


def _too_long(features: Features, rejection: Rejection) -> ProxyError | None:
    if rejection.code is None:
        return None
    return BadRequestError(
        f"{rejection.name}: {rejection.reason}; shorten the prompt",
        param=PROMPT_FIELD[features.endpoint],
        code=rejection.code,
    )


def _down_error(rejections: Sequence[Rejection]) -> ProxyError:
    reasons = "; ".join(f"{rejection.name}: {rejection.reason}" for rejection in rejections)
    too_far = any(rejection.code == TOO_FAR for rejection in rejections)
    kind = ModelTooFarError if too_far else ServiceUnavailableError
    return kind(f"no backend that can do this request is up now ({reasons})", retry_after=5)


# rule 12: whose model is near enough


def _near(
    features: Features, able: Sequence[BackendSnapshot], nearness: Nearness, rejections: list[Rejection]
) -> tuple[list[BackendSnapshot], dict[str, str]]:
    """The backends that may serve the request, and what their answers are marked with. Adds to `rejections`."""
    reference = features.backend or able[0].name
    near: list[BackendSnapshot] = []
    marks: dict[str, str] = {}
    for backend in able:
        if backend.name != reference:
            judgement = nearness.judge(reference, backend.name, features.model or "")
            if judgement.far and nearness.refuse:
                rejections.append(Rejection(backend.name, judgement.why, TOO_FAR))
                continue
            marks[backend.name] = judgement.mark
        near.append(backend)
    return near, marks


# rule 8: which replicas of a backend


@frozen
class Option:
    """A backend and its live replicas, best first. `reason`: why the first was chosen over the others."""

    backend: BackendSnapshot
    replicas: list[ReplicaSnapshot]
    reason: str = ""


def _options(
    features: Features, able: Sequence[BackendSnapshot], routing: Routing, rng: random.Random, now: float
) -> list[Option]:
    options = [_option(features, backend, routing, rng, now) for backend in able]
    return sorted([option for option in options if option.replicas], key=_is_closed)


def _is_closed(option: Option) -> bool:
    """Rule 11: its best replica is closed, and so are all others."""
    return option.replicas[0].closed


def _in_panic(backend: BackendSnapshot) -> BackendSnapshot:
    """The backend as if each replica were up that answers health checks (rule 10)."""
    replicas = [replace(replica, up=True) if replica.answers else replica for replica in backend.replicas]
    return replace(backend, replicas=tuple(replicas), usable=None)


def _option(features: Features, backend: BackendSnapshot, routing: Routing, rng: random.Random, now: float) -> Option:
    """Up to `routing.max_attempts` live replicas: the home first, then the less loaded of two."""
    if len(backend.replicas) == 1:
        return Option(backend, [replica for replica in backend.replicas if replica.up])
    live = _draw(backend, max(routing.max_attempts, 2), routing, rng, now)
    if len(live) < 2:
        return Option(backend, live)
    key, kind = _home_key(features)
    home = _home(backend, key, routing, now) if key else None
    if home is None:
        return Option(backend, live, "less loaded of two")
    others = [replica for replica in live if replica.name != home.name]
    return Option(backend, [home, *others][: routing.max_attempts], f"home of its {kind}")


def _draw(
    backend: BackendSnapshot, most: int, routing: Routing, rng: random.Random, now: float
) -> list[ReplicaSnapshot]:
    """Up to `most` live replicas, those with the fewest of our requests first, since only that count is never old.

    The first two are ordered by load (https://ieeexplore.ieee.org/document/963420). Closed ones come last (rule 11).
    """
    usable = backend.usable or usable_of(backend.replicas)
    live = _window(backend.replicas, usable.open, rng)
    if len(live) > 1 and live[1].load(now, routing) < live[0].load(now, routing):
        live[0], live[1] = live[1], live[0]
    if len(live) < most and usable.closed:
        live += _window(backend.replicas, usable.closed, rng)
    return live[:most]


def _window(replicas: Sequence[ReplicaSnapshot], indexes: Sequence[int], rng: random.Random) -> list[ReplicaSnapshot]:
    """WINDOW of these replicas from a random position on, those with the fewest of our requests first."""
    if not indexes:
        return []
    start = rng.randrange(len(indexes))
    chosen = indexes[start : start + WINDOW]
    if len(chosen) < WINDOW:  # wrap around
        chosen = (*chosen, *indexes[: min(start, WINDOW - len(chosen))])
    return sorted([replicas[index] for index in chosen], key=in_flight)


def _home_key(features: Features) -> tuple[str, str]:
    """The key, and what it is of. An empty key: no replica is the home."""
    if features.session:
        return features.session, "session"
    if features.prompt_words >= PREFIX_WORDS:
        return features.prefix, "prompt"
    return "", ""


def _home(backend: BackendSnapshot, key: str, routing: Routing, now: float) -> ReplicaSnapshot | None:
    """Consistent hashing with bounded loads, https://arxiv.org/abs/1608.01350.

    The first replica on the ring that has at most 1.25 times the mean of our requests, and that is not full.
    """
    share = math.ceil(SHARE * (backend.in_flight + 1) / len(backend.replicas))
    for index in islice(backend.ring.walk(key), WALK):
        replica = backend.replicas[index]
        if replica.up and replica.in_flight < share and not replica.closed and replica.load(now, routing) < 1:
            return replica
    return None


# rules 1 to 6: in which order


Ranked = tuple[Option, str, int]  # option, reason, tier


def _rank(features: Features, live: Sequence[Option], routing: Routing, now: float) -> list[Ranked]:
    if features.backend is not None:
        chosen = [option for option in live if option.backend.name == features.backend]
        others = [option for option in live if option.backend.name != features.backend] if features.fallback else []
        if not chosen:
            return _tiers([others], f"fallback: {features.backend}, which the client chose, is down")
        return _tiers([chosen, others], "explicit: the client chose it")
    gpus = [option for option in live if option.backend.device_class == "gpu"]
    cpus = [option for option in live if option.backend.device_class == "cpu"]
    if not gpus or not cpus:
        return _tiers([gpus or cpus], f"only: no {'CPU' if gpus else 'GPU'} backend is up that can do it")
    if features.alias is not None and features.alias.route is not None:
        return _by_alias(features.alias, gpus, cpus)
    long = _long(features, routing)
    if long:
        return _tiers([gpus, cpus], long)
    if len(gpus) > 1:
        gpus.sort(key=lambda option: (option.replicas[0].closed, option.replicas[0].load(now, routing)))
    gpu, cpu = gpus[0].replicas[0], cpus[0].replicas[0]
    load = gpu.load(now, routing)
    urgent = features.urgency == "high"
    limit = routing.urgent_load if urgent else routing.load_limit
    word = "urgent" if urgent else "default"
    if gpu.pressure is not None and gpu.closed and not cpu.closed:
        return _tiers([cpus + gpus], f"{word}_spill: GPU closed, {gpu.pressure.reason}")
    if cpu.pressure is not None and cpu.closed and not gpu.closed:
        return _tiers([gpus + cpus], f"{word}: CPU closed, {cpu.pressure.reason}")
    if load < limit:
        return _tiers([gpus + cpus], f"{word}: GPU load {load:.2f} < {limit:g}")
    return _tiers([cpus + gpus], f"{word}_spill: GPU load {load:.2f} >= {limit:g}")


def _by_alias(alias: UsedAlias, gpus: list[Option], cpus: list[Option]) -> list[Ranked]:
    """Rule 13."""
    if alias.route == "gpu":
        return _tiers([gpus, cpus], f"alias: {alias.pattern} goes to the GPU")
    pressure = cpus[0].replicas[0].pressure
    if pressure is not None and _is_closed(cpus[0]) and not _is_closed(gpus[0]):
        return _tiers([gpus + cpus], f"alias_spill: CPU closed, {pressure.reason}")
    return _tiers([cpus + gpus], f"alias: {alias.pattern} goes to the CPU first")


def _long(features: Features, routing: Routing) -> str | None:
    if features.prompt_words > routing.long_prompt_words:
        return f"long_prompt: {features.prompt_words} words > {routing.long_prompt_words}"
    if (features.max_tokens or 0) > routing.long_max_tokens and features.max_tokens_believed:
        return f"long_output: max_tokens {features.max_tokens} > {routing.long_max_tokens}"
    return None


def _tiers(tiers: Sequence[Sequence[Option]], reason: str) -> list[Ranked]:
    """`reason` is that of the first backend; the others are fallbacks for when it fails or is full."""
    ranked: list[Ranked] = []
    for tier, options in enumerate(tiers):
        for option in options:
            ranked.append((option, reason, tier))
            if len(ranked) == 1:
                reason = f"fallback: after {option.backend.name}"
    return ranked


# rule 9: the plan


def _candidates(ranked: list[Ranked], most: int) -> tuple[Candidate, ...]:
    """At most `most` candidates. Each backend gets one before any gets a second."""
    if len(ranked) > most:  # keep the first, which is the choice, and the last, which is the safety net
        ranked = [*ranked[: most - 1], ranked[-1]] if most > 1 else ranked[:1]
    spare = most - len(ranked)
    candidates: list[Candidate] = []
    for option, reason, tier in ranked:
        first = f"{reason}; {option.reason}" if option.reason else reason
        candidates.append(Candidate(option.backend, option.replicas[0], first, tier))
        for replica in option.replicas[1 : 1 + spare]:
            candidates.append(Candidate(option.backend, replica, reason, tier))
            spare -= 1
    return tuple(candidates)
