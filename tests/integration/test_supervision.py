"""Tasks that end, fail or are cancelled from within are started again; a process that hangs ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from tests.support.documents import ROOT
from xgen_proxy import supervision
from xgen_proxy.supervision import restarts, stop, supervise


async def ends() -> None:
    pass


async def fails() -> None:
    raise PermissionError(13, "Permission denied", "keys")


async def is_cancelled_from_within() -> None:
    """As by a cancel scope of a library that let its cancellation out."""
    raise asyncio.CancelledError


@pytest.fixture(autouse=True)
async def no_pause(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(supervision, "RESTART_PAUSE_S", 0.0)
    yield
    restarts.pop(("test",), None)


@pytest.mark.parametrize(
    ("first", "logged"),
    [
        (ends, "the background task test ended; it starts again"),
        (fails, "PermissionError"),
        (is_cancelled_from_within, "was cancelled from within"),
    ],
)
async def test_a_task_is_started_again(
    first: Callable[[], Coroutine[Any, Any, None]], logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = 0
    second = asyncio.Event()

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            await first()
            return
        second.set()
        await asyncio.Event().wait()

    task = supervise("test", run)
    assert restarts[("test",)] == 0, "the metric is there before the first failure"
    await asyncio.wait_for(second.wait(), 10)
    assert restarts[("test",)] == 1
    assert logged in caplog.text
    await stop(task, None)
    assert task.cancelled()
    assert runs == 2


HANGS = """
import asyncio
from xgen_proxy import supervision

supervision.HANG_S, supervision.HANG_CHECK_S = 1.0, 0.1

async def main():
    supervision.supervise("watchdog", supervision.exit_when_hung)
    await asyncio.sleep(0.1)
    {0}

asyncio.run(main())
print("went on")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANGS.format(code)]
    env = {"PYTHONPATH": str(ROOT / "proxy")}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("code", ["while True: pass", "import re; re.match('(a+)+$', 'a' * 60 + 'b')"])
def test_a_loop_that_hangs_ends_the_process_with_a_traceback(code: str) -> None:
    """Also where the GIL is held, as by a regular expression."""
    done = run(code)
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "in main" in done.stderr
    assert "went on" not in done.stdout


def test_a_loop_that_turns_is_left_alone() -> None:
    done = run("[await asyncio.sleep(0.1) for _ in range(30)]")
    assert done.stdout == "went on\n", done.stderr
