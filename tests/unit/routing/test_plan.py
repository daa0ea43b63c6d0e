from __future__ import annotations

import random
from dataclasses import replace

from tests.support.builders import cpu, down, features, gpu
from xgen_proxy.config.settings import Routing
from xgen_proxy.fleet.load import Scrape
from xgen_proxy.fleet.snapshot import BackendSnapshot, FleetSnapshot
from xgen_proxy.request.features import Features, UsedAlias
from xgen_proxy.routing.plan import Plan, explain
from xgen_proxy.routing.policy import decide


def plan(asked: Features, *backends: BackendSnapshot, routing: Routing | None = None, now: float = 0.0) -> Plan:
    return decide(asked, FleetSnapshot(backends), routing or Routing(), random.Random(0), now)


def test_explain_shows_candidates_rejections_and_features() -> None:
    asked = features(prompt_words=180)
    explained = explain(plan(asked, gpu(0.25), cpu(capabilities=frozenset(), models=frozenset())), asked)
    assert explained["candidates"] == [
        {
            "backend": "vllm",
            "replica": "vllm-0",
            "device_class": "gpu",
            "load": 0.25,
            "tier": 0,
            "memory": None,
            "reason": "only: no CPU backend is up that can do it",
        }
    ]
    assert explained["rejections"] == [{"name": "llama_cpp", "reason": "does not serve 'm'"}]
    assert explained["features"]["prompt_words"] == 180
    assert explained["error"] is None


def test_explain_shows_the_rule_that_decided() -> None:
    asked = features(prompt_words=180)
    explained = explain(plan(asked, gpu(0.25), cpu(capabilities=frozenset())), asked)
    assert explained["candidates"][0] == {
        "backend": "vllm",
        "replica": "vllm-0",
        "device_class": "gpu",
        "load": 0.25,
        "tier": 0,
        "memory": None,
        "reason": "long_prompt: 180 words > 100",
    }


def test_explain_shows_the_alias_and_whether_max_tokens_is_believed() -> None:
    assert explain(plan(features(), gpu()), features())["features"]["alias"] is None
    alias = UsedAlias("claude-haiku-4", "claude-haiku-*", "m", "cpu")
    asked = features(alias=alias, max_tokens=32_000, max_tokens_believed=False)
    explained = explain(plan(asked, gpu(), cpu()), asked)
    assert explained["candidates"][0]["reason"] == "alias: claude-haiku-* goes to the CPU first"
    shown = explained["features"]
    assert shown["alias"] == {"asked": "claude-haiku-4", "pattern": "claude-haiku-*", "route": "cpu"}
    assert (shown["model"], shown["max_tokens"], shown["max_tokens_believed"]) == ("m", 32_000, False)


def test_explain_shows_the_error() -> None:
    asked = features()
    error = explain(plan(asked, down(gpu())), asked)["error"]
    assert error["status"] == 503
    assert "no replica is up" in error["message"]


def test_explained_load_is_the_load_at_the_time_of_the_decision() -> None:
    """A minute later the scrape is stale and the load 1, and with other thresholds it is another load."""
    [replica] = gpu().replicas
    replica = replace(replica, scraped=Scrape(running=None, waiting=2.0, kv=None, at=0.0, stale_at=5.0))
    backend = gpu(replicas=(replica,))
    asked, routing = features(), Routing(waiting_full=4.0)
    made = plan(asked, backend, cpu(), routing=routing, now=5.0)
    assert explain(made, asked)["candidates"][0]["load"] == 0.5
    assert "GPU load 0.50" in made.candidates[0].reason
    late = plan(asked, backend, cpu(), routing=routing, now=6.0)
    assert [each["load"] for each in explain(late, asked)["candidates"]] == [0.0, 1.0]
