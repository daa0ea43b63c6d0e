"""Rules: what an engine needs changed in a request, or must never see. Each was found by running the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from xgen_proxy.dialects.backend_request import BackendRequest
from xgen_proxy.request.features import Json

Action = Literal["rename", "fill", "drop", "translate", "refuse"]


@dataclass(frozen=True, slots=True)
class Rule:
    """`hazard`: what the engine does if the rule is not applied.

    `apply` returns the same object if there is nothing to change. A body that no rule changes is sent as the client's
    own bytes. Raises BadRequestError if the engine cannot serve the request.
    """

    name: str
    action: Action
    hazard: str
    apply: Callable[[Json, BackendRequest], Json]
