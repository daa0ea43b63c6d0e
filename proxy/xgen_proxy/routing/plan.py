"""A plan: which replicas may serve a request, in which order, and why. Values only."""

from __future__ import annotations

from typing import Any

from xgen_proxy.config.settings import Routing
from xgen_proxy.errors import ProxyError
from xgen_proxy.fleet.snapshot import BackendSnapshot, ReplicaSnapshot
from xgen_proxy.request.features import Features
from xgen_proxy.values import frozen


@frozen
class Candidate:
    """Candidates of one `tier` are equally good: the first with a free slot gets the request. The next tier is for
    failures only: a request waits for the full replicas of an earlier tier. `distance`: of its model from that of the
    reference (rule 12), empty if there is none to tell."""

    backend: BackendSnapshot
    replica: ReplicaSnapshot
    reason: str
    tier: int
    distance: str = ""


@frozen
class Rejection:
    """A backend that cannot serve the request. `code`: OpenAI's error code, if there is one for the reason."""

    name: str
    reason: str
    code: str | None = None


@frozen
class Plan:
    """`error`: why there is no candidate. `now`, `routing`: the time and the settings it was decided with. `panic`:
    none of the candidates is up; they only answer health checks."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    now: float
    routing: Routing
    error: ProxyError | None = None
    panic: bool = False


def explain(plan: Plan, features: Features) -> dict[str, Any]:
    """The plan as JSON, for the dry run, with the very loads that it was decided on."""
    return {
        "candidates": [
            {
                "backend": candidate.backend.name,
                "replica": candidate.replica.name,
                "device_class": candidate.backend.device_class,
                "load": round(candidate.replica.load(plan.now, plan.routing), 4),
                "tier": candidate.tier,
                "memory": candidate.replica.pressure.reason if candidate.replica.pressure else None,
                "reason": candidate.reason,
                **({"model_distance": candidate.distance} if candidate.distance else {}),
            }
            for candidate in plan.candidates
        ],
        "rejections": [{"name": rejection.name, "reason": rejection.reason} for rejection in plan.rejections],
        "error": {"status": plan.error.status, **plan.error.fields()} if plan.error else None,
        "features": {
            "endpoint": features.endpoint,
            "model": features.model,
            "alias": _alias(features),
            "prompt_words": features.prompt_words,
            "prompt_tokens_estimate": features.prompt_tokens,
            "max_tokens": features.max_tokens,
            "max_tokens_believed": features.max_tokens_believed,
            "stream": features.stream,
            "needs": sorted(features.needs),
            "backend": features.backend or "auto",
            "urgency": features.urgency,
            "task_type": features.task_type,
            "fallback": features.fallback,
        },
    }


def _alias(features: Features) -> dict[str, Any] | None:
    """The name that the client sent, and the setting that says what it stands for."""
    alias = features.alias
    return {"asked": alias.asked, "pattern": alias.pattern, "route": alias.route} if alias else None
