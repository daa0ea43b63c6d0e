from __future__ import annotations

from xgen_proxy.dialects.registry import DIALECTS


def test_each_dialect_is_registered_under_its_name() -> None:
    assert {name: dialect.name for name, dialect in DIALECTS.items()} == {name: name for name in DIALECTS}
    assert list(DIALECTS) == ["vllm", "llama-server", "llama-cpp-python", "openai"]
