"""Real streams that are cut within a tool call, JSON or reasoning, and taken over by real servers.

A handful of cuts of each; `python -m bench.blocks` makes hundreds, also of reasoning on vLLM, which needs an engine of
its own for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.blocks import cut_and_judge, proxy_between
from tests.support import real_servers as servers
from tests.support.block_kinds import BLOCKS_TEMPLATE
from tests.support.real_servers import Server

KILLS = 2


@pytest.fixture(scope="module")
def blocks_server(logs: Path, gguf: str) -> Iterator[Server]:
    """A llama-server whose template knows tools and reasoning."""
    flags = ["--chat-template-file", str(BLOCKS_TEMPLATE)]
    with servers.running(servers.llama_server(logs / "blocks_server.log", gguf, *flags)) as server:
        yield server


@pytest.mark.parametrize(
    ("first", "second", "kind", "hold"),
    [
        ("vllm_server", "blocks_server", "tool call", False),
        ("blocks_server", "vllm_server", "tool call", False),
        ("vllm_server", "blocks_server", "JSON schema", False),
        ("vllm_server", "blocks_server", "JSON schema", True),
        ("blocks_server", "vllm_server", "JSON schema", True),
        ("blocks_server", "blocks_server", "JSON schema", False),
        ("blocks_server", "blocks_server", "reasoning", False),
    ],
)
def test_a_cut_within_a_block_is_invisible(
    request: pytest.FixtureRequest, tmp_path: Path, first: str, second: str, kind: str, hold: bool
) -> None:
    one: Server = request.getfixturevalue(first)
    other: Server = request.getfixturevalue(second)
    with proxy_between(tmp_path / "proxy.log", one, other, hold=hold) as (proxy, cutter):
        found = cut_and_judge(proxy, cutter, kind, KILLS, seed=1)
    assert found == {"cut": KILLS, "resumed": KILLS}
