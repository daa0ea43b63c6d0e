"""tests/integration/api/description compares the schemas with what a proxy answers."""

from __future__ import annotations

from dataclasses import fields

from xgen_proxy.api.description.answer_schemas import fleet, maybe, of, plan, schemas
from xgen_proxy.fleet.details.kv_cache import KvCache
from xgen_proxy.fleet.memory.process import Memory


def test_maybe() -> None:
    assert maybe({"type": "string"}) == {"type": ["string", "null"]}
    assert maybe({"$ref": "#/x"}) == {"anyOf": [{"$ref": "#/x"}, {"type": "null"}]}


def test_schemas_of_the_codes_own_types() -> None:
    assert of(KvCache)["required"] == [field.name for field in fields(KvCache)]
    assert of(Memory)["properties"]["process_rss_bytes"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}


def test_all_that_the_proxy_answers_itself_is_required() -> None:
    replica = fleet()["properties"]["backends"]["items"]["properties"]["replicas"]["items"]
    assert replica["required"] == list(replica["properties"])
    assert plan()["required"] == ["candidates", "rejections", "error", "features"]
    assert schemas().keys() >= {"Error", "ChatCompletion", "Fleet"}
