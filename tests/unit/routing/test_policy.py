from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.builders import backend, cpu, down, features, gpu, replica
from xgen_proxy.config.fallback import Nearness
from xgen_proxy.config.settings import Routing
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.fleet.memory.pressure import LEVELS, Pressure
from xgen_proxy.fleet.snapshot import (
    BackendSnapshot,
    FleetSnapshot,
    ReplicaSnapshot,
    from_json,
    shallow_dict,
    to_json,
    usable_of,
)
from xgen_proxy.request.features import NEEDS, Features, UsedAlias
from xgen_proxy.routing.plan import Plan, explain
from xgen_proxy.routing.policy import WINDOW, decide

ROUTING = Routing()
NOW = 1000.0


def decided(asked: Features, backends: list[BackendSnapshot], routing: Routing = ROUTING, seed: int = 0) -> Plan:
    return decide(asked, FleetSnapshot(tuple(backends)), routing, random.Random(seed), NOW)


def plan(backends: list[BackendSnapshot], routing: Routing = ROUTING, seed: int = 0, **values: Any) -> Plan:
    return decided(features(**values), backends, routing, seed)


def order(plan: Plan) -> list[str]:
    return [candidate.backend.name for candidate in plan.candidates]


def word(plan: Plan) -> str:
    return plan.candidates[0].reason.partition(":")[0]


def alias(route: Any) -> UsedAlias:
    return UsedAlias("claude-3", "claude-*", "m", route)


RULES = [
    # rule 1: an explicit backend wins, whatever the load and the length
    ({"backend": "llama_cpp", "prompt_words": 500}, gpu(), cpu(), ["llama_cpp", "vllm"], "explicit"),
    ({"backend": "vllm", "urgency": "high"}, gpu(5.0), cpu(), ["vllm", "llama_cpp"], "explicit"),
    # rule 2: long work goes to the GPU, starting one over each threshold
    ({"prompt_words": 100}, gpu(), cpu(), ["vllm", "llama_cpp"], "default"),
    ({"prompt_words": 101}, gpu(), cpu(), ["vllm", "llama_cpp"], "long_prompt"),
    ({"max_tokens": 1024}, gpu(), cpu(), ["vllm", "llama_cpp"], "default"),
    ({"max_tokens": 1025}, gpu(), cpu(), ["vllm", "llama_cpp"], "long_output"),
    ({"max_tokens": 32000, "max_tokens_believed": False}, gpu(), cpu(), ["vllm", "llama_cpp"], "default"),
    ({"max_tokens": 32000, "max_tokens_believed": False}, gpu(1.0), cpu(), ["llama_cpp", "vllm"], "default_spill"),
    (
        {"max_tokens": 9, "max_tokens_believed": False, "prompt_words": 101},
        gpu(),
        cpu(),
        ["vllm", "llama_cpp"],
        "long_prompt",
    ),
    ({"prompt_words": 101}, gpu(3.0), cpu(), ["vllm", "llama_cpp"], "long_prompt"),
    ({"prompt_words": 101}, down(gpu()), cpu(), ["llama_cpp"], "only"),
    ({"prompt_words": 101, "urgency": "high"}, gpu(0.9), cpu(), ["vllm", "llama_cpp"], "long_prompt"),
    # rule 3: urgent work takes the GPU below 0.7
    ({"urgency": "high"}, gpu(0.69), cpu(), ["vllm", "llama_cpp"], "urgent"),
    ({"urgency": "high"}, gpu(0.7), cpu(), ["llama_cpp", "vllm"], "urgent_spill"),
    ({"urgency": "high"}, down(gpu()), cpu(), ["llama_cpp"], "only"),
    # rules 4 and 6: otherwise the GPU; short work spills at the load limit
    ({}, gpu(), cpu(), ["vllm", "llama_cpp"], "default"),
    ({}, gpu(0.999), cpu(), ["vllm", "llama_cpp"], "default"),
    ({}, gpu(1.0), cpu(), ["llama_cpp", "vllm"], "default_spill"),
    ({"urgency": "low"}, gpu(1.0), cpu(), ["llama_cpp", "vllm"], "default_spill"),
    ({}, down(gpu()), cpu(), ["llama_cpp"], "only"),
    ({}, gpu(), down(cpu()), ["vllm"], "only"),
    # rule 7: a backend that cannot serve the request is rejected
    ({"needs": frozenset({"tools"})}, gpu(), cpu(capabilities=NEEDS - {"tools"}), ["vllm"], "only"),
    ({"needs": frozenset({"tools"})}, gpu(capabilities=frozenset()), cpu(), ["llama_cpp"], "only"),
    ({}, gpu(models=frozenset({"other"})), cpu(), ["llama_cpp"], "only"),
    ({"prompt_tokens": 5000}, gpu(context=8192), cpu(context=2048), ["vllm"], "only"),
    # rule 9: the client may forbid fallbacks
    ({"fallback": False}, gpu(), cpu(), ["vllm"], "default"),
    ({"fallback": False, "backend": "llama_cpp"}, gpu(), cpu(), ["llama_cpp"], "explicit"),
    ({"backend": "vllm"}, down(gpu()), cpu(), ["llama_cpp"], "fallback"),
    # rule 13: the route of an alias stands above rules 2 to 6, and below rule 1
    ({"alias": alias("cpu")}, gpu(), cpu(), ["llama_cpp", "vllm"], "alias"),
    ({"alias": alias("cpu"), "prompt_words": 500, "urgency": "high"}, gpu(), cpu(), ["llama_cpp", "vllm"], "alias"),
    ({"alias": alias("cpu"), "fallback": False}, gpu(), cpu(), ["llama_cpp"], "alias"),
    ({"alias": alias("cpu"), "backend": "vllm"}, gpu(), cpu(), ["vllm", "llama_cpp"], "explicit"),
    ({"alias": alias("cpu")}, gpu(), down(cpu()), ["vllm"], "only"),
    ({"alias": alias("gpu")}, gpu(9.0), cpu(), ["vllm", "llama_cpp"], "alias"),
    ({"alias": alias("gpu")}, down(gpu()), cpu(), ["llama_cpp"], "only"),
    ({"alias": alias(None)}, gpu(1.0), cpu(), ["llama_cpp", "vllm"], "default_spill"),
]


@pytest.mark.parametrize(("values", "one", "other", "names", "reason"), RULES)
def test_rules(
    values: dict[str, Any], one: BackendSnapshot, other: BackendSnapshot, names: list[str], reason: str
) -> None:
    made = plan([one, other], **values)
    assert order(made) == names
    assert word(made) == reason


# rule 11: a replica that the memory guard has closed counts as full


def closed(snapshot: BackendSnapshot) -> BackendSnapshot:
    pressure = Pressure("closed", 3, "memory: KV cache 98% used")
    return replace(snapshot, replicas=tuple(replace(each, pressure=pressure) for each in snapshot.replicas))


CLOSED = [
    ({}, closed(gpu()), cpu(), ["llama_cpp", "vllm"], "default_spill"),
    ({}, closed(gpu()), cpu(9.0), ["llama_cpp", "vllm"], "default_spill"),
    ({"urgency": "high"}, closed(gpu()), cpu(), ["llama_cpp", "vllm"], "urgent_spill"),
    ({}, gpu(2.0), closed(cpu()), ["vllm", "llama_cpp"], "default"),
    ({}, closed(gpu()), closed(cpu()), ["llama_cpp", "vllm"], "default_spill"),
    ({"prompt_words": 101}, closed(gpu()), cpu(), ["vllm", "llama_cpp"], "long_prompt"),
    ({"backend": "vllm"}, closed(gpu()), cpu(), ["vllm", "llama_cpp"], "explicit"),
    ({}, closed(gpu()), down(cpu()), ["vllm"], "only"),
    ({}, closed(backend("a")), backend("b", load=5.0), ["b", "a"], "only"),
    ({"alias": alias("cpu")}, gpu(), closed(cpu()), ["vllm", "llama_cpp"], "alias_spill"),
    ({"alias": alias("cpu")}, closed(gpu()), closed(cpu()), ["llama_cpp", "vllm"], "alias"),
    ({"alias": alias("gpu")}, closed(gpu()), cpu(), ["vllm", "llama_cpp"], "alias"),
]


@pytest.mark.parametrize(("values", "one", "other", "names", "reason"), CLOSED)
def test_closed_replicas_come_last_and_are_never_left_out(
    values: dict[str, Any], one: BackendSnapshot, other: BackendSnapshot, names: list[str], reason: str
) -> None:
    made = plan([one, other], Routing(load_limit=1.0), **values)
    assert order(made) == names
    assert word(made) == reason


def test_a_load_limit_over_1_does_not_open_a_closed_replica() -> None:
    made = plan([closed(gpu()), cpu()], Routing(load_limit=9.0))
    assert made.candidates[0].reason == "default_spill: GPU closed, memory: KV cache 98% used"
    assert explain(made, features())["candidates"][1]["memory"] == "memory: KV cache 98% used"


@pytest.mark.parametrize("session", [None, "s"])
@pytest.mark.parametrize("count", [2, 4, 200])
def test_within_a_backend_closed_replicas_come_last(count: int, session: str | None) -> None:
    [pressed] = closed(gpu()).replicas
    idle = [replace(pressed, name=f"closed-{number}") for number in range(count - 1)]
    busy = replica("open", 3.0, in_flight=9)
    snapshot = gpu(replicas=(*idle, busy))
    for seed in range(20):
        candidates = plan([snapshot], seed=seed, session=session).candidates
        assert candidates[0].replica.name == "open"
        assert len(candidates) == min(count, ROUTING.max_attempts)


def test_thresholds_are_settings() -> None:
    routing = Routing(long_prompt_words=3, urgent_load=0.1, load_limit=0.2)
    assert word(plan([gpu(), cpu()], routing, prompt_words=4)) == "long_prompt"
    assert word(plan([gpu(0.1), cpu()], routing, urgency="high", prompt_words=1)) == "urgent_spill"
    assert word(plan([gpu(0.2), cpu()], routing, prompt_words=1)) == "default_spill"


def test_only_long_or_explicit_work_waits_for_the_gpu() -> None:
    def tiers(plan: Plan) -> list[int]:
        return [candidate.tier for candidate in plan.candidates]

    assert tiers(plan([gpu(2.0), cpu()], prompt_words=101)) == [0, 1]
    assert tiers(plan([gpu(2.0), cpu()])) == [0, 0]
    assert tiers(plan([gpu(), cpu()], backend="vllm")) == [0, 1]
    assert tiers(plan([gpu(2.0), cpu()], alias=alias("gpu"))) == [0, 1]
    assert tiers(plan([gpu(), cpu(2.0)], alias=alias("cpu"))) == [0, 0]


ERRORS = [
    ({"backend": "tpu"}, [gpu(), cpu()], 400, "there is no backend 'tpu'; choose auto or one of llama_cpp, vllm"),
    ({"backend": "vllm", "needs": frozenset({"n"})}, [gpu(capabilities=frozenset()), cpu()], 400, "vllm cannot do n"),
    (
        {"needs": frozenset({"images"})},
        [gpu(capabilities=frozenset()), cpu(capabilities=frozenset())],
        400,
        "vllm cannot do images",
    ),
    ({"prompt_tokens": 9000}, [gpu(), cpu()], 400, "exceeds its context of 2048"),
    ({"prompt_tokens": 9000, "backend": "vllm"}, [gpu(), cpu()], 400, "exceeds its context of 2048"),
    ({}, [down(gpu()), down(cpu())], 503, "no backend that can do this request is up now"),
    ({"backend": "vllm", "fallback": False}, [down(gpu()), cpu()], 503, "vllm: no replica is up"),
]


@pytest.mark.parametrize(("values", "backends", "status", "message"), ERRORS)
def test_errors(values: dict[str, Any], backends: list[BackendSnapshot], status: int, message: str) -> None:
    made = plan(backends, **values)
    assert made.candidates == ()
    assert made.error is not None
    assert made.error.status == status
    assert message in made.error.message


def test_too_long_prompt_has_openais_error_code() -> None:
    error = plan([gpu()], prompt_tokens=9000).error
    assert error is not None
    assert error.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("endpoint", "param"), [("chat", "messages"), ("completions", "prompt"), ("embeddings", "input")]
)
def test_too_long_prompt_names_its_field(endpoint: str, param: str) -> None:
    error = plan([gpu()], prompt_tokens=9000, endpoint=endpoint).error
    assert error is not None
    assert error.param == param


def test_error_for_unknown_backend_cuts_its_name() -> None:
    error = plan([gpu()], backend="x" * 9000).error
    assert error is not None
    assert len(error.message) < 200


def test_estimate_just_over_the_context_does_not_reject() -> None:
    assert order(plan([gpu(context=2048)], prompt_tokens=4096)) == ["vllm"]
    assert order(plan([gpu(context=2048)], prompt_tokens=4098)) == []


def test_less_loaded_of_two_replicas_comes_first() -> None:
    pair = (replica("a", 0.9), replica("b", 0.1))
    for seed in range(20):
        made = plan([gpu(replicas=pair)], seed=seed)
        assert [candidate.replica.name for candidate in made.candidates] == ["b", "a"]


def some(count: int) -> tuple[ReplicaSnapshot, ...]:
    return tuple(replica(f"r{n}") for n in range(count))


def first(backend: BackendSnapshot, seed: int = 0, **values: Any) -> str:
    return plan([backend], seed=seed, **values).candidates[0].replica.name


def homes(backend: BackendSnapshot) -> dict[str, str]:
    return {key: first(backend, session=key) for key in map(str, range(200))}


def test_session_stays_at_its_home() -> None:
    backend = gpu(replicas=some(4))
    assert len({first(backend, seed, session="a") for seed in range(20)}) == 1
    assert set(homes(backend).values()) == {"r0", "r1", "r2", "r3"}
    assert plan([backend], session="a").candidates[0].reason.endswith("; home of its session")


def test_long_enough_prompt_prefix_stays_at_its_home() -> None:
    backend = gpu(replicas=some(4))
    assert len({first(backend, seed, prefix="Once", prompt_words=50) for seed in range(20)}) == 1
    assert plan([backend], prefix="Once", prompt_words=50).candidates[0].reason.endswith("; home of its prompt")
    assert len({first(backend, seed, prefix="Once", prompt_words=49) for seed in range(100)}) == 4
    assert plan([backend], prefix="Once", prompt_words=49).candidates[0].reason.endswith("; less loaded of two")


def test_removing_a_replica_moves_only_its_own_sessions() -> None:
    before, after = homes(gpu(replicas=some(5))), homes(gpu(replicas=some(4)))
    moved = {key for key in before if before[key] != after[key]}
    assert moved == {key for key in before if before[key] == "r4"}


def test_home_with_more_than_its_share_passes_on_to_the_same_replica() -> None:
    replicas = some(4)
    home = first(gpu(replicas=replicas), session="a")

    def at_home(in_flight: int, others: int, **values: Any) -> BackendSnapshot:
        return gpu(
            replicas=tuple(
                replica(each.name, in_flight=in_flight, **values)
                if each.name == home
                else replica(each.name, in_flight=others)
                for each in replicas
            )
        )

    assert len({first(at_home(1, others=0), seed, session="a") for seed in range(20)} - {home}) == 1
    assert first(at_home(4, others=4), session="a") == home, "5.3 is 1.25 times the mean of 17 requests"
    assert first(at_home(4, others=4, load=1.0), session="a") != home, "other proxies fill it"
    assert first(at_home(4, others=4, up=False), session="a") != home


def test_session_without_a_free_home_is_placed_by_load() -> None:
    full = tuple(replica(f"r{n}", 1.0 + n, in_flight=9) for n in range(3))
    assert plan([gpu(replicas=full)], session="a").candidates[0].reason.endswith("; less loaded of two")


def test_down_replicas_are_skipped() -> None:
    replicas = tuple(replica(f"r{n}", up=n == 7) for n in range(10))
    for seed in range(20):
        assert [each.replica.name for each in plan([gpu(replicas=replicas)], seed=seed).candidates] == ["r7"]


def test_cpu_is_in_the_plan_beside_many_gpu_replicas() -> None:
    many = gpu(replicas=tuple(replica(f"r{n:02}") for n in range(50)))
    made = plan([many, cpu()])
    assert len(made.candidates) == ROUTING.max_attempts
    assert order(made)[-1] == "llama_cpp"


@pytest.mark.parametrize("seed", range(10))
def test_single_attempt_goes_to_the_first_choice(seed: int) -> None:
    """The safety net must not displace the choice itself, nor the choice between two replicas."""
    pair = (replica("a", 0.9), replica("b", 0.1))
    made = plan([gpu(replicas=pair), cpu()], Routing(max_attempts=1), seed)
    assert [(each.replica.name, each.reason.partition(":")[0]) for each in made.candidates] == [("b", "default")]


def test_equal_replicas_share_the_work() -> None:
    replicas = tuple(replica(f"r{n}") for n in range(4))
    firsts = {plan([gpu(replicas=replicas)], seed=seed).candidates[0].replica.name for seed in range(100)}
    assert firsts == {"r0", "r1", "r2", "r3"}


@pytest.mark.parametrize("session", [None, "s"])
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_load_is_computed_for_few_of_a_thousand_replicas(level: Any, session: str | None) -> None:
    computed = 0

    class Counting(ReplicaSnapshot):
        __slots__ = ()

        def load(self, now: float, routing: Routing) -> float:
            nonlocal computed
            computed += 1
            return super().load(now, routing)

    pressure = None if level is None else Pressure(level, 3, "memory: short")
    thousand = [replace(replica(f"r{n}", 9.0), pressure=pressure) for n in range(1000)]
    plan([gpu(replicas=tuple(Counting(**shallow_dict(each)) for each in thousand))], session=session)
    assert computed <= 2 + 8, "two of the window, and along the ring"


def test_only_a_window_of_the_usable_replicas_is_looked_at() -> None:
    """As many as there are; which are usable is known from the snapshot."""
    looked: set[str] = set()

    class Watched(ReplicaSnapshot):
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            looked.add(object.__getattribute__(self, "name"))
            return object.__getattribute__(self, name)

    for level in ("normal", "reduced", "closed"):
        closed = replace(replica("r"), pressure=Pressure(level, 3, "memory: short"))
        thousand = tuple(Watched(**{**shallow_dict(closed), "name": f"r{n}"}) for n in range(1000))
        snapshot = replace(gpu(replicas=thousand), usable=usable_of(thousand))
        looked.clear()
        assert plan([snapshot]).candidates
        assert len(looked) <= WINDOW


scrapes = st.builds(
    Scrape,
    running=st.none() | st.integers(0, 20).map(float),
    waiting=st.none() | st.integers(0, 10).map(float),
    kv=st.none() | st.floats(0, 1),
    at=st.floats(NOW - 10, NOW),
    stale_at=st.floats(NOW - 5, NOW + 5),
    ours=st.integers(0, 10),
)
replicas_strategy = st.builds(
    ReplicaSnapshot,
    name=st.uuids().map(str),
    up=st.booleans(),
    in_flight=st.integers(0, 10),
    slots=st.integers(1, 10),
    overcommit=st.integers(0, 4),
    slow_start_at=st.none() | st.floats(NOW - 20, NOW),
    scraped=st.none() | scrapes,
    answers=st.booleans(),
    pressure=st.none() | st.builds(Pressure, st.sampled_from(LEVELS), st.integers(1, 9), st.just("memory: short")),
)


backends_strategy = st.lists(
    st.builds(
        backend,
        name=st.sampled_from(["a", "b", "c", "vllm", "llama_cpp"]),
        device_class=st.sampled_from(["gpu", "cpu"]),
        replicas=st.lists(replicas_strategy, min_size=1, max_size=5).map(
            lambda replicas: tuple(sorted(replicas, key=lambda replica: replica.name))
        ),
        models=st.sampled_from([frozenset({"m"}), frozenset({"m", "n"}), frozenset({"n"})]),
        capabilities=st.sets(st.sampled_from(sorted(NEEDS))).map(frozenset),
        context=st.sampled_from([None, 10, 2048]),
    ),
    max_size=5,
    unique_by=lambda backend: backend.name,
)
features_strategy = st.builds(
    features,
    prompt_words=st.integers(0, 300),
    prompt_tokens=st.integers(0, 5000),
    max_tokens=st.none() | st.integers(1, 3000),
    needs=st.sets(st.sampled_from(sorted(NEEDS)), max_size=2).map(frozenset),
    backend=st.none() | st.sampled_from(["a", "vllm", "nobody"]),
    urgency=st.sampled_from(["high", "normal", "low"]),
    fallback=st.booleans(),
    max_tokens_believed=st.booleans(),
    alias=st.sampled_from([None, *map(alias, [None, "cpu", "gpu"])]),
)


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_decide_never_raises_and_candidates_are_able(asked: Any, backends: list[BackendSnapshot], seed: int) -> None:
    made = decided(asked, backends, seed=seed)
    assert (made.error is None) == bool(made.candidates)
    assert len(made.candidates) <= ROUTING.max_attempts
    for candidate in made.candidates:
        assert candidate.replica.up or candidate.replica.answers
        assert asked.model in candidate.backend.models
        assert asked.needs <= candidate.backend.capabilities
    explain(made, asked)


def is_able(asked: Features, backend: BackendSnapshot) -> bool:
    fits = backend.context is None or asked.prompt_tokens / 2 <= backend.context
    return asked.model in backend.models and asked.needs <= backend.capabilities and fits


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_any_able_replica_that_answers_is_tried_and_none_that_does_not(
    asked: Features, backends: list[BackendSnapshot], seed: int
) -> None:
    made = decided(asked, backends, seed=seed)
    usable = {
        replica.name: replica.up
        for each in backends
        if is_able(asked, each) and (asked.fallback or asked.backend in (None, each.name))
        for replica in each.replicas
        if replica.up or replica.answers
    }
    wrong = asked.backend and not any(each.name == asked.backend and is_able(asked, each) for each in backends)
    assert bool(made.candidates) == (bool(usable) and not wrong)
    assert {candidate.replica.name for candidate in made.candidates} <= usable.keys()
    if made.candidates:
        assert made.panic == (not any(usable.values()))
    assert {candidate.reason.startswith("panic: ") for candidate in made.candidates} <= {made.panic}
    if not made.panic:
        assert all(usable[candidate.replica.name] for candidate in made.candidates)


def suspect(snapshot: BackendSnapshot) -> BackendSnapshot:
    return replace(snapshot, replicas=tuple(replace(each, up=False, answers=True) for each in snapshot.replicas))


@pytest.mark.parametrize(
    ("values", "one", "other", "names", "reason"),
    [
        ({}, suspect(gpu()), down(cpu()), ["vllm"], "panic: none is up, this one answers; only: "),
        ({}, suspect(gpu()), suspect(cpu()), ["vllm", "llama_cpp"], "panic: none is up, this one answers; default: "),
        ({}, suspect(gpu()), cpu(), ["llama_cpp"], "only: "),
        ({"backend": "vllm"}, suspect(gpu()), cpu(), ["llama_cpp"], "fallback: "),
        ({"backend": "vllm", "fallback": False}, suspect(gpu()), cpu(), ["vllm"], "panic: "),
    ],
)
def test_panic(
    values: dict[str, Any], one: BackendSnapshot, other: BackendSnapshot, names: list[str], reason: str
) -> None:
    made = plan([one, other], **values)
    assert order(made) == names
    assert made.candidates[0].reason.startswith(reason)
    assert made.panic == reason.startswith("panic")


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_explicit_backend_comes_first(asked: Any, backends: list[BackendSnapshot], seed: int) -> None:
    made = decided(asked, backends, seed=seed)
    live = any(each.name == asked.backend and any(r.up for r in each.replicas) for each in backends)
    if asked.backend and made.candidates and live:
        assert made.candidates[0].backend.name == asked.backend


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9), shuffle=st.randoms())
def test_order_of_the_backends_does_not_matter(asked: Any, backends: Any, seed: int, shuffle: Any) -> None:
    shuffled = list(backends)
    shuffle.shuffle(shuffled)
    one = decided(asked, backends, seed=seed)
    other = decided(asked, shuffled, seed=seed)
    names = [[(c.replica.name, c.reason, c.tier) for c in each.candidates] for each in (one, other)]
    assert names[0] == names[1]


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_cpu_is_last_unless_chosen(asked: Any, backends: list[BackendSnapshot], seed: int) -> None:
    chosen = asked.alias is not None and asked.alias.route == "cpu"
    made = decided(replace(asked, backend=None, alias=None if chosen else asked.alias), backends, seed=seed)
    paths = [candidate.backend.device_class for candidate in made.candidates]
    if made.candidates and "_spill: " not in made.candidates[0].reason:
        assert paths == sorted(paths, reverse=True)  # every gpu before every cpu


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_round_tripped_snapshot_gives_the_same_plan(asked: Any, backends: list[BackendSnapshot], seed: int) -> None:
    fleet = FleetSnapshot(tuple(backends))
    copy = from_json(orjson.loads(orjson.dumps(to_json(fleet))))
    one, other = (decide(asked, each, ROUTING, random.Random(seed), NOW) for each in (fleet, copy))
    assert one.candidates == other.candidates
    assert one.rejections == other.rejections
    assert explain(one, asked) == explain(other, asked)


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_deciding_twice_gives_the_same_plan(asked: Any, backends: list[BackendSnapshot], seed: int) -> None:
    one, other = (decided(asked, backends, seed=seed) for _ in range(2))
    assert (one.candidates, one.rejections) == (other.candidates, other.rejections)


# rule 12: the distance between models


def near(top1: float, least: float | None = 0.95, *, refuse: bool = True) -> Nearness:
    pair = ("vllm", "llama_cpp", "m")
    return Nearness(least, refuse, {pair: top1, ("llama_cpp", "vllm", "m"): top1})


def planned(nearness: Nearness | None, *backends: BackendSnapshot, **asked: Any) -> Plan:
    return decide(features(**asked), FleetSnapshot(backends), ROUTING, random.Random(0), NOW, nearness)


def names_of(plan: Plan) -> list[tuple[str, str]]:
    return [(candidate.backend.name, candidate.distance) for candidate in plan.candidates]


def test_a_near_fallback_is_marked() -> None:
    assert names_of(planned(near(0.97), gpu(), cpu())) == [("vllm", ""), ("llama_cpp", "top1=0.97")]


@pytest.mark.parametrize("first", [gpu(), gpu(load=2.0)])
def test_a_far_fallback_gets_nothing(first: BackendSnapshot) -> None:
    """Whether the reference has room or not."""
    plan = planned(near(0.87), first, cpu())
    assert names_of(plan) == [("vllm", "")]
    [rejection] = plan.rejections
    assert rejection.name == "llama_cpp"
    assert rejection.reason == "its model is too far from vllm's: top1 0.87 < fallback.min_top1 0.95"


def test_a_far_fallback_gets_nothing_while_the_reference_is_down() -> None:
    plan = planned(near(0.87), down(gpu()), cpu())
    assert plan.error is not None
    assert (plan.error.status, plan.error.code) == (503, "model_too_far")
    assert "llama_cpp: its model is too far from vllm's" in plan.error.message


def test_a_suspect_reference_is_tried_rather_than_a_far_fallback() -> None:
    suspect = down(gpu())
    suspect = replace(suspect, replicas=tuple(replace(each, answers=True) for each in suspect.replicas))
    assert names_of(planned(near(0.87), suspect, cpu())) == [("vllm", "")]


def test_a_far_fallback_may_be_marked_only() -> None:
    assert names_of(planned(near(0.87, refuse=False), gpu(), cpu()))[1] == ("llama_cpp", "top1=0.87; far")


def test_the_explicit_backend_is_the_reference() -> None:
    plan = planned(near(0.87), gpu(), cpu(), backend="llama_cpp")
    assert names_of(plan) == [("llama_cpp", "")]
    assert [rejection.name for rejection in plan.rejections] == ["vllm"]


def test_a_fallback_that_was_not_measured_is_marked_unknown() -> None:
    nearness = Nearness(0.95, refuse=True, top1={})
    assert names_of(planned(nearness, gpu(), cpu()))[1] == ("llama_cpp", "unknown")


def test_a_different_model_is_refused_without_a_measurement() -> None:
    nearness = Nearness(0.5, refuse=True, top1={}, different=frozenset({("vllm", "llama_cpp", "m")}))
    assert names_of(planned(nearness, gpu(), cpu())) == [("vllm", "")]


def test_a_backend_that_cannot_serve_the_request_is_no_reference() -> None:
    unable = gpu(models=frozenset({"other"}))
    assert names_of(planned(near(0.87), unable, cpu())) == [("llama_cpp", "")]
