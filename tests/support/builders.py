"""Small stand-ins for what decide() reads, and Features with everything at rest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from xgen_proxy.fleet.hash_ring import HashRing
from xgen_proxy.request.features import NEEDS, Features

AT_REST = Features(
    endpoint="chat", model="m", prompt_words=5, prompt_tokens=7, max_tokens=None, stream=False, include_usage=False,
    needs=frozenset(), backend=None, urgency="normal", task_type=None, fallback=True, continuation=True, hinted=False,
    session=None, prefix="hi",
)  # fmt: skip


def features(**values: Any) -> Features:
    return replace(AT_REST, **values)


@dataclass
class FakeReplica:
    name: str
    load: float = 0.0
    up: bool = True
    in_flight: int = 0


@dataclass
class FakeBackend:
    name: str
    device_class: str = "gpu"
    replicas: tuple[FakeReplica, ...] = ()
    models: frozenset[str] = frozenset({"m"})
    capabilities: frozenset[str] = NEEDS
    context: int | None = 2048
    load: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if not self.replicas:
            self.replicas = (FakeReplica(f"{self.name}-0", self.load),)
        self.ring = HashRing(self.replicas)

    @property
    def in_flight(self) -> int:
        return sum(replica.in_flight for replica in self.replicas)


def gpu(load: float = 0.0, **values: Any) -> FakeBackend:
    return FakeBackend("vllm", "gpu", load=load, **values)


def cpu(load: float = 0.0, **values: Any) -> FakeBackend:
    return FakeBackend("llama_cpp", "cpu", load=load, **values)


def down(backend: FakeBackend) -> FakeBackend:
    return replace(backend, replicas=tuple(replace(each, up=False) for each in backend.replicas))
