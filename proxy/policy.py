"""decide(): which replicas may serve a request, in which order, and why. Pure: no I/O, no clock, no hidden randomness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proxy.errors import ProxyError


class ReplicaView(Protocol):
    """What a decision may know of one server process."""

    @property
    def name(self) -> str: ...
    @property
    def up(self) -> bool: ...
    @property
    def load(self) -> float:
        """Worst of in-flight/slots, waiting/5 and KV usage/0.8 (rule 5): 0 idle, 1 full, may exceed 1."""


class BackendView(Protocol):
    """What a decision may know of a set of interchangeable replicas, sorted by name."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...  # "gpu" | "cpu"
    @property
    def models(self) -> frozenset[str]: ...  # public names; kept when every replica is down
    @property
    def can(self) -> frozenset[str]: ...  # members of features.Need
    @property
    def context(self) -> int | None: ...
    @property
    def replicas(self) -> Sequence[ReplicaView]: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """Candidates of one `tier` are equally right: the first with a free slot takes the request. The next tier is for
    failures only: full replicas of an earlier tier are waited for."""

    backend: BackendView
    replica: ReplicaView
    reason: str
    tier: int


@dataclass(frozen=True, slots=True)
class Rejection:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`error` says why, where there is no candidate."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    error: ProxyError | None = None
