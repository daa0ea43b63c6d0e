"""vLLM's engine is killed under load, and no request is lost. `python -m bench.chaos` is the large version."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import chaos
from tests.support.real_servers import Server


@pytest.mark.timeout(900)  # vLLM takes 35 s to restart, three minutes on a busy machine
def test_no_request_is_lost(vllm_server: Server, llama_server: Server, tmp_path: Path) -> None:
    storm = chaos.run(1, 30, ["kill-engine"], vllm_server, llama_server, tmp_path)
    assert len(storm.answers) == 30
    assert storm.ok, storm.report()
