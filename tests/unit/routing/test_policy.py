from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.builders import FakeBackend, FakeReplica, cpu, down, features, gpu
from xgen_proxy.config.settings import Routing
from xgen_proxy.request.features import NEEDS
from xgen_proxy.routing.policy import Plan, decide, explain

ROUTING = Routing()


def plan(backends: list[FakeBackend], routing: Routing = ROUTING, seed: int = 0, **values: Any) -> Plan:
    return decide(features(**values), backends, routing, random.Random(seed))


def order(decided: Plan) -> list[str]:
    return [candidate.backend.name for candidate in decided.candidates]


def word(decided: Plan) -> str:
    return decided.candidates[0].reason.partition(":")[0]


RULES = [
    # rule 1: an explicit backend wins, whatever the load and the length
    ({"backend": "llama_cpp", "prompt_words": 500}, gpu(), cpu(), ["llama_cpp", "vllm"], "explicit"),
    ({"backend": "vllm", "urgency": "high"}, gpu(5.0), cpu(), ["vllm", "llama_cpp"], "explicit"),
    # rule 2: long work goes to the GPU, from one over each threshold
    ({"prompt_words": 100}, gpu(), cpu(), ["vllm", "llama_cpp"], "default"),
    ({"prompt_words": 101}, gpu(), cpu(), ["vllm", "llama_cpp"], "long_prompt"),
    ({"max_tokens": 1024}, gpu(), cpu(), ["vllm", "llama_cpp"], "default"),
    ({"max_tokens": 1025}, gpu(), cpu(), ["vllm", "llama_cpp"], "long_output"),
    ({"prompt_words": 101}, gpu(3.0), cpu(), ["vllm", "llama_cpp"], "long_prompt"),
    ({"prompt_words": 101}, down(gpu()), cpu(), ["llama_cpp"], "only"),
    ({"prompt_words": 101, "urgency": "high"}, gpu(0.9), cpu(), ["vllm", "llama_cpp"], "long_prompt"),
    # rule 3: urgent work takes the GPU below 0.7
    ({"urgency": "high"}, gpu(0.69), cpu(), ["vllm", "llama_cpp"], "urgent"),
    ({"urgency": "high"}, gpu(0.7), cpu(), ["llama_cpp", "vllm"], "urgent_spill"),
    ({"urgency": "high"}, down(gpu()), cpu(), ["llama_cpp"], "only"),
    # rules 4 and 6: else the GPU, and short work spills from the limit on
    ({}, gpu(), cpu(), ["vllm", "llama_cpp"], "default"),
    ({}, gpu(0.999), cpu(), ["vllm", "llama_cpp"], "default"),
    ({}, gpu(1.0), cpu(), ["llama_cpp", "vllm"], "default_spill"),
    ({"urgency": "low"}, gpu(1.0), cpu(), ["llama_cpp", "vllm"], "default_spill"),
    ({}, down(gpu()), cpu(), ["llama_cpp"], "only"),
    ({}, gpu(), down(cpu()), ["vllm"], "only"),
    # rule 7: who cannot do it is passed over
    ({"needs": frozenset({"tools"})}, gpu(), cpu(capabilities=NEEDS - {"tools"}), ["vllm"], "only"),
    ({"needs": frozenset({"tools"})}, gpu(capabilities=frozenset()), cpu(), ["llama_cpp"], "only"),
    ({}, gpu(models=frozenset({"other"})), cpu(), ["llama_cpp"], "only"),
    ({"prompt_tokens": 5000}, gpu(context=8192), cpu(context=2048), ["vllm"], "only"),
    # rule 9: the client may forbid the rest
    ({"fallback": False}, gpu(), cpu(), ["vllm"], "default"),
    ({"fallback": False, "backend": "llama_cpp"}, gpu(), cpu(), ["llama_cpp"], "explicit"),
    ({"backend": "vllm"}, down(gpu()), cpu(), ["llama_cpp"], "fallback"),
]


@pytest.mark.parametrize(("values", "one", "other", "names", "reason"), RULES)
def test_rules(values: dict[str, Any], one: FakeBackend, other: FakeBackend, names: list[str], reason: str) -> None:
    decided = plan([one, other], **values)
    assert order(decided) == names
    assert word(decided) == reason


def test_thresholds_are_settings() -> None:
    routing = Routing(long_prompt_words=3, urgent_load=0.1, load_limit=0.2)
    assert word(plan([gpu(), cpu()], routing, prompt_words=4)) == "long_prompt"
    assert word(plan([gpu(0.1), cpu()], routing, urgency="high", prompt_words=1)) == "urgent_spill"
    assert word(plan([gpu(0.2), cpu()], routing, prompt_words=1)) == "default_spill"


def test_long_work_waits_for_the_gpu_and_short_work_does_not() -> None:
    tiers = lambda decided: [candidate.tier for candidate in decided.candidates]  # noqa: E731
    assert tiers(plan([gpu(2.0), cpu()], prompt_words=101)) == [0, 1]
    assert tiers(plan([gpu(2.0), cpu()])) == [0, 0]
    assert tiers(plan([gpu(), cpu()], backend="vllm")) == [0, 1]


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
def test_errors(values: dict[str, Any], backends: list[FakeBackend], status: int, message: str) -> None:
    decided = plan(backends, **values)
    assert decided.candidates == ()
    assert decided.error is not None
    assert decided.error.status == status
    assert message in decided.error.message


def test_a_prompt_that_is_too_long_has_openais_code() -> None:
    error = plan([gpu()], prompt_tokens=9000).error
    assert error is not None
    assert error.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("endpoint", "param"), [("chat", "messages"), ("completions", "prompt"), ("embeddings", "input")]
)
def test_a_prompt_that_is_too_long_names_its_own_field(endpoint: str, param: str) -> None:
    error = plan([gpu()], prompt_tokens=9000, endpoint=endpoint).error
    assert error is not None
    assert error.param == param


def test_a_backend_that_is_not_there_is_told_in_brief() -> None:
    error = plan([gpu()], backend="x" * 9000).error
    assert error is not None
    assert len(error.message) < 200


def test_an_estimate_just_over_the_context_is_left_to_the_backend() -> None:
    assert order(plan([gpu(context=2048)], prompt_tokens=4096)) == ["vllm"]
    assert order(plan([gpu(context=2048)], prompt_tokens=4098)) == []


def test_the_less_loaded_of_two_goes_first() -> None:
    pair = (FakeReplica("a", 0.9), FakeReplica("b", 0.1))
    for seed in range(20):
        decided = plan([gpu(replicas=pair)], seed=seed)
        assert [candidate.replica.name for candidate in decided.candidates] == ["b", "a"]


def some(count: int) -> tuple[FakeReplica, ...]:
    return tuple(FakeReplica(f"r{n}") for n in range(count))


def first(backend: FakeBackend, seed: int = 0, **values: Any) -> str:
    return plan([backend], seed=seed, **values).candidates[0].replica.name


def homes(backend: FakeBackend) -> dict[str, str]:
    return {key: first(backend, session=key) for key in map(str, range(200))}


def test_a_session_stays_at_home() -> None:
    backend = gpu(replicas=some(4))
    assert len({first(backend, seed, session="a") for seed in range(20)}) == 1
    assert set(homes(backend).values()) == {"r0", "r1", "r2", "r3"}
    assert plan([backend], session="a").candidates[0].reason.endswith("; home of its session")


def test_a_prompt_that_begins_alike_stays_at_home_if_there_is_enough_of_it() -> None:
    backend = gpu(replicas=some(4))
    assert len({first(backend, seed, prefix="Once", prompt_words=50) for seed in range(20)}) == 1
    assert plan([backend], prefix="Once", prompt_words=50).candidates[0].reason.endswith("; home of its prompt")
    assert len({first(backend, seed, prefix="Once", prompt_words=49) for seed in range(100)}) == 4
    assert plan([backend], prefix="Once", prompt_words=49).candidates[0].reason.endswith("; less loaded of two")


def test_who_comes_or_goes_moves_only_its_own_sessions() -> None:
    before, after = homes(gpu(replicas=some(5))), homes(gpu(replicas=some(4)))
    moved = {key for key in before if before[key] != after[key]}
    assert moved == {key for key in before if before[key] == "r4"}


def test_a_home_with_more_than_its_share_sends_on_always_to_the_same() -> None:
    replicas = some(4)
    backend = gpu(replicas=replicas)
    home = first(backend, session="a")
    busy = next(each for each in replicas if each.name == home)
    busy.in_flight = 1
    assert len({first(backend, seed, session="a") for seed in range(20)} - {home}) == 1
    for each in replicas:
        each.in_flight = 4
    assert first(backend, session="a") == home, "5.3 is its share and a quarter of 17"
    busy.load = 1.0
    assert first(backend, session="a") != home, "others fill it"
    busy.load, busy.up = 0.0, False
    assert first(backend, session="a") != home


def test_where_nobody_near_on_the_ring_has_room_two_are_drawn() -> None:
    full = tuple(FakeReplica(f"r{n}", 1.0 + n, in_flight=9) for n in range(3))
    assert plan([gpu(replicas=full)], session="a").candidates[0].reason.endswith("; less loaded of two")


def test_dead_replicas_are_passed_over() -> None:
    replicas = tuple(FakeReplica(f"r{n}", up=n == 7) for n in range(10))
    for seed in range(20):
        assert [each.replica.name for each in plan([gpu(replicas=replicas)], seed=seed).candidates] == ["r7"]


def test_the_cpu_is_in_the_plan_however_many_gpus_there_are() -> None:
    many = gpu(replicas=tuple(FakeReplica(f"r{n:02}") for n in range(50)))
    decided = plan([many, cpu()])
    assert len(decided.candidates) == ROUTING.max_attempts
    assert order(decided)[-1] == "llama_cpp"


@pytest.mark.parametrize("seed", range(10))
def test_a_single_attempt_goes_to_the_first_choice(seed: int) -> None:
    """Room for the safety net must not push out the choice itself, nor the choice between two replicas."""
    pair = (FakeReplica("a", 0.9), FakeReplica("b", 0.1))
    decided = plan([gpu(replicas=pair), cpu()], Routing(max_attempts=1), seed)
    assert [(each.replica.name, each.reason.partition(":")[0]) for each in decided.candidates] == [("b", "default")]


def test_replicas_share_the_work() -> None:
    replicas = tuple(FakeReplica(f"r{n}") for n in range(4))
    firsts = {plan([gpu(replicas=replicas)], seed=seed).candidates[0].replica.name for seed in range(100)}
    assert firsts == {"r0", "r1", "r2", "r3"}


def test_a_thousand_replicas_are_not_looked_at_one_by_one() -> None:
    looks = 0

    class Counting(FakeReplica):
        @property
        def load(self) -> float:
            nonlocal looks
            looks += 1
            return 0.5

        @load.setter
        def load(self, value: float) -> None: ...

    plan([gpu(replicas=tuple(Counting(f"r{n}") for n in range(1000)))])
    assert looks <= 4


backends_strategy = st.lists(
    st.builds(
        FakeBackend,
        name=st.sampled_from(["a", "b", "c", "vllm", "llama_cpp"]),
        device_class=st.sampled_from(["gpu", "cpu"]),
        replicas=st.lists(
            st.builds(FakeReplica, name=st.uuids().map(str), load=st.floats(0, 3), up=st.booleans()),
            min_size=1,
            max_size=5,
        ).map(lambda replicas: tuple(sorted(replicas, key=lambda replica: replica.name))),
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
)


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_no_rule_raises_and_no_plan_names_one_that_cannot(asked: Any, backends: list[FakeBackend], seed: int) -> None:
    decided = decide(asked, backends, ROUTING, random.Random(seed))
    assert (decided.error is None) == bool(decided.candidates)
    assert len(decided.candidates) <= ROUTING.max_attempts
    for candidate in decided.candidates:
        assert candidate.replica.up
        assert asked.model in candidate.backend.models
        assert asked.needs <= candidate.backend.capabilities
    explain(decided, asked)


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_an_explicit_backend_is_first(asked: Any, backends: list[FakeBackend], seed: int) -> None:
    decided = decide(asked, backends, ROUTING, random.Random(seed))
    live = any(each.name == asked.backend and any(r.up for r in each.replicas) for each in backends)
    if asked.backend and decided.candidates and live:
        assert decided.candidates[0].backend.name == asked.backend


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9), shuffle=st.randoms())
def test_the_order_of_the_fleet_does_not_matter(asked: Any, backends: Any, seed: int, shuffle: Any) -> None:
    shuffled = list(backends)
    shuffle.shuffle(shuffled)
    one = decide(asked, backends, ROUTING, random.Random(seed))
    other = decide(asked, shuffled, ROUTING, random.Random(seed))
    names = [[(c.replica.name, c.reason, c.tier) for c in each.candidates] for each in (one, other)]
    assert names[0] == names[1]


@given(asked=features_strategy, backends=backends_strategy, seed=st.integers(0, 9))
def test_the_cpu_is_last_unless_chosen(asked: Any, backends: list[FakeBackend], seed: int) -> None:
    decided = decide(replace(asked, backend=None), backends, ROUTING, random.Random(seed))
    paths = [candidate.backend.device_class for candidate in decided.candidates]
    if decided.candidates and not decided.candidates[0].reason.startswith(("urgent_spill", "default_spill")):
        assert paths == sorted(paths, reverse=True)  # every gpu before every cpu


def test_explain_is_what_a_person_reads() -> None:
    asked = features(prompt_words=180)
    told = explain(decide(asked, [gpu(0.25), cpu(capabilities=frozenset())], ROUTING, random.Random(0)), asked)
    assert told["candidates"][0] == {
        "backend": "vllm", "replica": "vllm-0", "device_class": "gpu", "load": 0.25, "tier": 0,
        "reason": "long_prompt: 180 words > 100",
    }  # fmt: skip
    assert told["features"]["prompt_words"] == 180
    assert told["error"] is None
