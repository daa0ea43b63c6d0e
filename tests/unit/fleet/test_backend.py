from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import SecretStr

from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.fleet.memory.pressure import Pressure
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.fleet.snapshot import Usable, usable_of

URLS = [f"http://127.0.0.1:{port}" for port in (1, 2)]


def settings(**values: object) -> Settings:
    return Settings(backends={"vllm": {"urls": URLS, "dialect": "vllm", "slots": 20, **values}})


def backend(**values: object) -> Backend:
    [made] = Fleet(settings(**values)).backends
    return made


CHANGES: dict[str, Callable[[Replica], object]] = {
    "acquire": lambda replica: replica.acquire(),
    "release": lambda replica: replica.release(),
    "state": lambda replica: replica.set_state("up", "test"),
    "mark_up": lambda replica: replica.mark_up("test"),
    "mark_suspect": lambda replica: replica.mark_suspect("test"),
    "answer": lambda replica: replica.record_answer(),
    "scrape": lambda replica: replica.record_scrape(Scrape(1.0, 0.0, 0.1, at=0.0, stale_at=9.0)),
    "slots": lambda replica: replica.record_info(ReplicaInfo(("m",), slots=7)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_snapshot_follows_each_change_of_a_replica(change: Callable[[Replica], object]) -> None:
    made = backend(slots=None)
    replica, other = made.replicas
    replica.acquire()
    replica.set_state("suspect", "test")
    before = made.snapshot()
    change(replica)
    after = made.snapshot()
    assert after.replicas[0] == replica.snapshot()
    assert after.in_flight == made.in_flight == replica.in_flight
    assert after.replicas[1] is before.replicas[1], "the other one is not rebuilt"
    assert after.replicas[1] == other.snapshot()


def test_snapshot_knows_which_replicas_are_usable() -> None:
    made = backend(slots=None)
    one, other = made.replicas
    assert made.snapshot().usable == Usable((), ())
    one.set_state("up", "test")
    other.set_state("up", "test")
    assert made.snapshot().usable == Usable((0, 1), ())
    one.memory.pressure = Pressure("closed", 3, "memory: short")
    one.record_pressure()
    assert made.snapshot().usable == Usable((1,), (0,))
    before = made.snapshot().usable
    other.acquire()
    assert made.snapshot().usable is before, "looking at all replicas again would take long"
    other.release()
    other.set_state("down", "test")
    assert made.snapshot().usable == Usable((), (0,))
    made.reconcile([URLS[1]])
    assert made.snapshot().usable == usable_of(made.snapshot().replicas) == Usable((), ())


def test_snapshot_is_cached_until_something_changes() -> None:
    fleet = Fleet(settings())
    before = fleet.snapshot()
    assert fleet.snapshot().backends[0] is before.backends[0]
    next(iter(fleet.replicas)).acquire()
    assert fleet.snapshot() != before
    assert before.backends[0].in_flight == 0, "a snapshot does not change"


def test_snapshot_follows_settings_and_replica_infos() -> None:
    fleet = Fleet(settings())
    [made] = fleet.backends
    fleet.snapshot()
    made.record_info(made.replicas[0], ReplicaInfo(("m",), context=4096, capabilities=frozenset({"tools"})))
    [snapshot] = fleet.snapshot().backends
    assert (snapshot.models, snapshot.context, snapshot.capabilities) == (frozenset({"m"}), 4096, frozenset({"tools"}))
    fleet.configure(settings(slots=3, context=1000, tools=False))
    [snapshot] = fleet.snapshot().backends
    assert (snapshot.context, snapshot.capabilities) == (1000, frozenset())
    assert [replica.slots for replica in snapshot.replicas] == [3, 3]


def test_snapshot_follows_reconcile() -> None:
    made = backend()
    made.snapshot()
    replica = made.replicas[1]
    replica.acquire()
    [removed] = made.reconcile(URLS[:1])
    assert removed is replica
    assert removed.state == "draining"
    snapshot = made.snapshot()
    assert [each.name for each in snapshot.replicas] == ["vllm@127.0.0.1:1"]
    assert snapshot.in_flight == 1, "a draining replica's requests count"
    assert list(snapshot.ring.walk("key")) == [0]
    removed.release()
    assert made.snapshot().in_flight == 0
    assert removed.name not in made.replicas_by_name


def test_draining_replica_that_is_listed_again_is_kept() -> None:
    made = backend()
    replica = made.replicas[1]
    made.reconcile(URLS[:1])
    assert not replica.set_state("up", "test"), "a draining replica keeps draining"
    assert made.reconcile(URLS) == []
    assert made.replicas[1] is replica
    assert (replica.state, replica.reason, made.draining) == ("starting", "listed again", {})
    assert made.replicas_by_name[replica.name] is replica


def test_backend_has_the_capabilities_of_all_its_replicas() -> None:
    made = backend(embeddings=True, tools=False)
    first, second = made.replicas
    made.record_info(first, ReplicaInfo(("a", "b"), 4096, capabilities=frozenset({"tools", "n", "echo"})))
    made.record_info(second, ReplicaInfo(("b", "c"), 2048, capabilities=frozenset({"tools", "n"})))
    assert made.capabilities == {"n", "embeddings"}
    assert (made.models, made.context) == (frozenset({"a", "b", "c"}), 2048)


def test_what_only_a_removed_replica_served_is_forgotten() -> None:
    made = backend()
    made.record_info(made.replicas[0], ReplicaInfo(("m",), 4096))
    made.record_info(made.replicas[1], ReplicaInfo(("m", "lora"), 2048))
    made.reconcile(URLS[:1])
    assert (made.models, made.context) == (frozenset({"m"}), 4096)


def test_infos_are_kept_while_all_replicas_are_gone() -> None:
    made = backend()
    made.record_info(made.replicas[0], ReplicaInfo(("m",), 4096))
    made.reconcile([])
    assert (made.models, made.context) == (frozenset({"m"}), 4096)
    assert made.snapshot().replicas == ()


def test_fleet_configure_keeps_backends_of_the_same_dialect() -> None:
    one = {"urls": URLS, "dialect": "vllm"}
    fleet = Fleet(Settings(backends={"a": one, "b": one, "c": one}))
    a, b, c = fleet.backends
    removed = fleet.configure(Settings(backends={"a": {**one, "api_key": "hush"}, "b": {**one, "dialect": "openai"}}))
    assert removed == [b, c]
    assert fleet.backends[0] is a
    assert a.settings.api_key == SecretStr("hush")
    assert all(b"authorization: Bearer hush\r\n" in replica.head for replica in a.replicas)
    assert fleet.backends[1].dialect.name == "openai"


def test_a_capability_that_all_engines_deny_is_gone_until_one_goes_down() -> None:
    vllm = backend(tools=True)
    first, second = vllm.replicas
    info = ReplicaInfo(("m",))
    for replica in (first, second):
        vllm.record_info(replica, info)
    assert vllm.lost_capability(first, "tools")
    assert not vllm.lost_capability(first, "tools")
    assert "tools" in vllm.snapshot().capabilities, "a request fails over to the second"
    assert vllm.lost_capability(second, "tools")
    assert "tools" not in vllm.snapshot().capabilities
    vllm.record_info(second, info)
    assert "tools" not in vllm.capabilities
    first.set_state("down", "gone")
    vllm.record_info(first, info)
    assert "tools" in vllm.snapshot().capabilities
    assert vllm.lost_capability(first, "tools")
    vllm.record_info(first, ReplicaInfo(("another",)))
    assert "tools" in vllm.snapshot().capabilities, "that was of another model"
    vllm.record_info(first, ReplicaInfo(("third",)), frozenset({"tools"}))
    assert "tools" not in vllm.snapshot().capabilities


@pytest.mark.parametrize(("dialect", "lost"), [("openai", False), ("vllm", True)])
def test_what_one_of_several_models_lacks_says_nothing_of_the_others(dialect: str, lost: bool) -> None:
    """llama-swap and Ollama run an engine for each model; the models of a vLLM are one and its LoRA adapters."""
    [backend] = Fleet(Settings(backends={"a": {"urls": URLS[:1], "dialect": dialect}})).backends
    [replica] = backend.replicas
    backend.record_info(replica, ReplicaInfo(("text", "vision")))
    assert backend.lost_capability(replica, "images") == lost
    assert ("images" in backend.snapshot().capabilities) != lost
