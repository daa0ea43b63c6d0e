"""A real process whose log cannot be written: requests are answered, the CPU is idle, lost lines are counted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.support.running_proxy import get
from tests.support.server_process import Process
from tests.support.waiting import wait_until

REQUESTS = 600  # their lines are more than the 64 KiB that a pipe holds
TICKS = os.sysconf("SC_CLK_TCK")


class LoggingTo(Process):
    def __init__(self, directory: Path, stderr: int) -> None:
        self.stderr = stderr
        super().__init__(directory, "--vllm", "http://127.0.0.1:1")


@contextmanager
def process(directory: Path, stderr: int) -> Iterator[Process]:
    process = LoggingTo(directory, stderr)
    try:
        yield process
    finally:
        process.close()


def refused_requests(process: Process, count: int) -> None:
    """Each writes one line to the log."""
    with httpx.Client(verify=False, timeout=20) as client:
        for _ in range(count):
            assert client.post(f"{process.url}/v1/chat/completions", content=b"{").status_code == 400


def dropped(process: Process) -> float:
    [value] = re.findall(r"^xgen_dropped_log_lines_total (\S+)$", get(f"{process.url}/metrics").text, re.MULTILINE)
    return float(value)


def cpu_seconds(process: Process) -> float:
    fields = Path(f"/proc/{process.child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def assert_idle(process: Process) -> None:
    """It used to spin: the loop's error handler logged the failed write, which failed."""
    before = cpu_seconds(process)
    for _ in range(20):
        assert process.asked("/health") == 200
    assert cpu_seconds(process) - before < 0.5


def test_a_full_disk(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with process(tmp_path, full) as running:
        refused_requests(running, 3)
        wait_until(lambda: dropped(running) >= 3)
        assert_idle(running)
    os.close(full)


def test_a_pipe_that_nobody_has_open(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with process(tmp_path, writer) as running:
        os.close(reader)
        refused_requests(running, 3)
        wait_until(lambda: dropped(running) >= 3)
        assert_idle(running)
    os.close(writer)


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """Request 159 got no answer any more."""
    reader, writer = os.pipe()
    with process(tmp_path, writer) as running:
        refused_requests(running, REQUESTS)
        assert dropped(running) == 0
        assert_idle(running)
        os.set_blocking(reader, False)
        text = b""

        def read() -> bool:
            nonlocal text
            with suppress(BlockingIOError):
                text += os.read(reader, 65536)
            return text.count(b'"message":"refused"') == REQUESTS

        wait_until(read)
    os.close(reader)
    os.close(writer)
