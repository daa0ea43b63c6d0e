from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support.builders import features
from tests.support.requests import make_call
from xgen_proxy.config.settings import Settings
from xgen_proxy.dialects.backend_request import ReplicaInfo
from xgen_proxy.errors import ModelNotFoundError, ServiceUnavailableError
from xgen_proxy.fleet.backend import Fleet
from xgen_proxy.routing.router import Router, sequences

GPU = {"urls": ["http://127.0.0.1:1", "http://127.0.0.1:2"], "dialect": "vllm", "models": {"m": "m"}}
CPU = {"urls": ["http://127.0.0.1:3"], "dialect": "llama-server"}


def router(**values: Any) -> Router:
    settings = Settings(backends={"vllm": GPU, "llama_cpp": CPU}, **values)
    fleet = Fleet(settings)
    for replica in fleet.replicas:
        replica.set_state("up", "test")
    return Router(fleet, random.Random(0))


def report(router: Router, *models: str) -> None:
    """The CPU's replica reports its models."""
    backend = router.fleet.backends[0]
    backend.record_info(backend.replicas[0], ReplicaInfo(models))


def test_targets_are_the_live_replicas_in_the_order_of_the_plan() -> None:
    made = router()
    report(made, "m")
    plan = made.plan(features())
    targets = made.targets(plan)
    assert {target.replica for target in targets} == set(made.fleet.replicas)
    assert [(each.backend.name, each.replica.name, each.reason, each.tier) for each in targets] == [
        (each.backend.name, each.replica.name, each.reason, each.tier) for each in plan.candidates
    ]


def test_replica_that_was_removed_since_the_plan_is_no_target() -> None:
    made = router()
    report(made, "m")
    plan = made.plan(features())
    vllm = made.fleet.backends[1]
    [removed] = vllm.reconcile(["http://127.0.0.1:1"])
    assert len(plan.candidates) == 3
    assert removed not in [target.replica for target in made.targets(plan)]
    assert len(made.targets(plan)) == 2


def test_plan_without_candidates_raises_its_error() -> None:
    made = router()
    report(made, "m")
    for replica in made.fleet.replicas:
        replica.set_state("down", "test")
    plan = made.plan(features())
    assert plan.candidates == ()
    with pytest.raises(ServiceUnavailableError) as raised:
        made.targets(plan)
    assert raised.value is plan.error


def test_unknown_model_is_not_found_once_every_backend_has_reported() -> None:
    made = router()
    with pytest.raises(ServiceUnavailableError, match="llama_cpp has not been reached yet"):
        made.plan(features(model="other"))
    report(made, "n")
    with pytest.raises(ModelNotFoundError, match="known models: m, n"):
        made.plan(features(model="other"))


def test_default_model_is_the_configured_one_else_the_gpus_first() -> None:
    assert router(default_model="x").default_model() == "x"
    assert router().default_model() == "m"
    empty = Settings(backends={"llama_cpp": CPU})
    with pytest.raises(ServiceUnavailableError, match="no model is known"):
        Router(Fleet(empty), random.Random(0)).default_model()


def test_new_settings_apply_to_the_next_plan() -> None:
    settings = Settings(backends={"vllm": GPU})
    fleet = Fleet(settings)
    for replica in fleet.replicas:
        replica.set_state("up", "test")
    made = Router(fleet, random.Random(0))
    assert len(made.plan(features()).candidates) == 2
    routing = settings.routing.model_copy(update={"max_attempts": 1})
    fleet.configure(settings.model_copy(update={"routing": routing}))
    assert len(made.plan(features()).candidates) == 1


@pytest.mark.parametrize(("endpoint", "fields", "expected"), [
    ("chat", {}, 1),
    ("chat", {"n": 3}, 3),
    ("chat", {"n": None}, 1),
    ("completions", {"prompt": "One"}, 1),
    ("completions", {"prompt": ["One", "Two"]}, 2),
    ("completions", {"prompt": ["One", "Two"], "n": 3}, 6),
    ("completions", {"prompt": [1, 2, 3]}, 1),
    ("completions", {"prompt": [[1, 2], [3]]}, 2),
    ("completions", {"best_of": 4, "n": 2}, 4),
    ("embeddings", {"input": ["One", "Two", "Three"]}, 3),
    ("embeddings", {"input": "One"}, 1),
])  # fmt: skip
def test_request_counts_as_its_choices_times_its_prompts(endpoint: Any, fields: Any, expected: int) -> None:
    assert sequences(make_call(endpoint, **fields)) == expected


def test_request_takes_all_slots_of_a_replica_at_most() -> None:
    made = router()
    report(made, "m")
    targets = made.targets(made.plan(features()), 100)
    assert {target.backend.name: target.slots for target in targets} == {"vllm": 100, "llama_cpp": 4}


def test_model_is_not_found_where_a_backend_was_reached_and_has_none() -> None:
    made = router()
    report(made)
    with pytest.raises(ModelNotFoundError):
        made.plan(features(model="unknown"))


def test_an_alias_of_an_unknown_model_is_named_with_it() -> None:
    made = router(models={"aliases": {"claude-*": "gone"}})
    alias = made.find_alias("claude-3")
    assert alias is not None
    asked = features(model=alias.model, alias=alias)
    with pytest.raises(ServiceUnavailableError, match=r"'gone', for which 'claude-3' stands .*, and llama_cpp has not"):
        made.plan(asked)
    report(made, "n", "claude-own")
    with pytest.raises(
        ModelNotFoundError, match=r"'gone', for which 'claude-3' stands \(.*claude-\*\), does not exist"
    ):
        made.plan(asked)
    assert made.find_alias("claude-own") is None, "a backend serves it"
    assert router().find_alias("claude-3") is None
