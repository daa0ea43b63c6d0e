"""The live side of routing: take a snapshot of the fleet, decide, and find the live replicas of the plan."""

from __future__ import annotations

import random
import time

from xgen_proxy.errors import ModelNotFoundError, ProxyError, ServiceUnavailableError, quoted
from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.request.call import Call
from xgen_proxy.request.features import Features, UsedAlias
from xgen_proxy.request.opaque.endpoints import OPAQUE
from xgen_proxy.request.opaque.parsing import sequences_of
from xgen_proxy.routing.plan import Plan
from xgen_proxy.routing.policy import decide
from xgen_proxy.values import frozen


@frozen
class Target:
    """A candidate resolved to its live replica and the backend that it belongs to. `panic`: of a plan whose candidates
    are not up; it is enough that they answer health checks. `slots`: those that the request takes there. `distance`: of
    its model from the reference's (rule 12), empty if there is none to tell."""

    backend: Backend
    replica: Replica
    reason: str
    tier: int
    panic: bool = False
    slots: int = 1
    distance: str = ""

    @property
    def usable(self) -> bool:
        return self.replica.state == "up" or (self.panic and self.replica.answers)


SEVERAL = frozenset({"n", "prompt_list"})  # what a request of several sequences needs


def sequences(call: Call) -> int:
    """How many sequences an engine runs for the request at once: its choices times its prompts."""
    body, features = call.body, call.features
    if features.endpoint in OPAQUE:
        return sequences_of(features.endpoint, body)
    if features.endpoint != "embeddings" and features.needs.isdisjoint(SEVERAL):
        return 1
    prompts = body.get("input" if features.endpoint == "embeddings" else "prompt")
    count = 1
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):  # else it is one, as token ids
        count = len(prompts)
    return count * max(body.get("n") or 1, body.get("best_of") or 1)


class Router:
    """Plans requests for the fleet as it is now. `rng` breaks ties between replicas."""

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self.fleet = fleet
        self._rng = rng

    def default_model(self) -> str:
        """The model of a request that names none. Raises ServiceUnavailableError while no model is known."""
        model = self.fleet.default_model
        if model is None:
            raise ServiceUnavailableError("no backend has been reached yet, so that no model is known", retry_after=5)
        return model

    def find_alias(self, name: str) -> UsedAlias | None:
        """None: it is a model's own name, or unknown."""
        models = self.fleet.settings.models
        return models.find(name, self._is_served) if models.aliases else None

    def _is_served(self, model: str | None) -> bool:
        return any(model in backend.models for backend in self.fleet.backends)

    def plan(self, features: Features, spare: int = 0) -> Plan:
        """A plan without candidates has an error. `spare`: candidates beyond routing.max_attempts, which the caller
        will not use. Raises ModelNotFoundError, ServiceUnavailableError."""
        if not self._is_served(features.model):
            raise self._unknown(features)
        fleet, routing = self.fleet, self.fleet.settings.routing
        if spare:
            routing = routing.model_copy(update={"max_attempts": routing.max_attempts + spare})
        return decide(features, fleet.snapshot(), routing, self._rng, time.monotonic(), fleet.nearness)

    def _unknown(self, features: Features) -> ProxyError:
        """404 only once every backend has been reached; until then 503."""
        name, alias = quoted(features.model), features.alias
        if alias is not None:
            name += f", for which {quoted(alias.asked)} stands (models.aliases, {alias.pattern}),"
        unreached = [
            each.name for each in self.fleet.backends if not each.models and not any(r.info for r in each.replicas)
        ]
        if unreached:
            return ServiceUnavailableError(
                f"no running backend serves {name}{'' if alias else ','} and {', '.join(unreached)} has not been"
                " reached yet",
                retry_after=5,
            )
        known = ", ".join(self.fleet.models[:20])
        return ModelNotFoundError(f"the model {name} does not exist; known models: {known}", param="model")

    def targets(self, plan: Plan, sequences: int = 1) -> list[Target]:
        """The live replicas of the plan, without those that are no longer listed. Raises the plan's error if it has
        one.

        `sequences`: what the request counts as. It takes all slots of a replica at most.
        """
        if plan.error is not None:
            raise plan.error
        backends = self.fleet.backends_by_name
        return [
            Target(
                backend,
                replica,
                candidate.reason,
                candidate.tier,
                plan.panic,
                min(sequences, replica.slots),
                candidate.distance,
            )
            for candidate in plan.candidates
            if (backend := backends.get(candidate.backend.name))
            and (replica := backend.replicas_by_name.get(candidate.replica.name))
        ]
