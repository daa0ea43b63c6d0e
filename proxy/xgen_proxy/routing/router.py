"""From a request's features to live targets."""

from __future__ import annotations

import random
from collections.abc import Sequence

from xgen_proxy.errors import ModelNotFoundError, ServiceUnavailableError
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.request.features import Features
from xgen_proxy.routing.policy import Candidate as Target
from xgen_proxy.routing.policy import Plan, decide

__all__ = ["Router", "Target"]


class Router:
    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self.fleet = fleet
        self._rng = rng

    def default_model(self) -> str:
        model = self.fleet.default_model
        if model is None:
            raise ServiceUnavailableError("no backend has been reached yet, so that no model is known", retry_after=5)
        return model

    def plan(self, features: Features) -> Plan:
        self._check_model(features.model)
        return decide(features, self.fleet.backends, self.fleet.settings.routing, self._rng)

    def targets(self, plan: Plan) -> Sequence[Target]:
        if plan.error is not None:
            raise plan.error
        return plan.candidates

    def _check_model(self, model: str | None) -> None:
        """A name is unknown for certain only when every backend has reported its models."""
        for backend in self.fleet.backends:
            if model in backend.models:
                return
        silent = [backend.name for backend in self.fleet.backends if not backend.models]
        if silent:
            raise ServiceUnavailableError(
                f"no running backend serves {model!r}, and {', '.join(silent)} has not been reached yet", retry_after=5
            )
        raise ModelNotFoundError(
            f"the model {model!r} does not exist; known models: {', '.join(self.fleet.models[:20])}", param="model"
        )
