"""Claude Code and Codex work on a task while the GPU's engine is killed: it is done, and they show no error."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.clients.agents.agent import Agent
from tests.e2e.clients.demonstration import AGENTS, WORD, play
from tests.e2e.clients.installed import NotInstalledError, install_node
from tests.e2e.clients.matrix import YES, recorded
from tests.e2e.clients.scripted_model import AFTER
from tests.support.unavailable import unavailable

DONE = {row["client"] for row in recorded() if row["engine killed"] == YES}


@pytest.mark.timeout(600)  # the first test installs
@pytest.mark.parametrize("agent", [agent for agent in AGENTS if agent.name in DONE], ids=lambda agent: agent.name)
def test_a_task_outlives_the_gpus_engine(agent: Agent, tmp_path: Path) -> None:
    try:
        install_node()
    except NotInstalledError as error:
        unavailable(f"NOT TESTED WITH CODING AGENTS: {error}")
    session = play(agent, tmp_path)
    assert session.gpu_status == -signal.SIGKILL, "the engine was not killed"
    assert session.status == 0, session.printed
    assert session.written == f"{WORD}\n"
    assert AFTER in session.printed
    assert "error" not in session.printed.lower()
    assert any(line.get("continued") for line in session.log), "no answer was resumed"
