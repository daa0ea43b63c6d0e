"""Against the real /proc of this machine, and a child process whose memory is known."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LOOPBACK
from xgen_proxy.fleet.memory import process as process_memory

CHILD = """
import mmap, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
model = open(sys.argv[1], "rb")
mapped = [mmap.mmap(model.fileno(), 0, prot=mmap.PROT_READ) for _ in range(2)]
block = b'x' * 50_000_000
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that listens, has a model file mapped twice (as llama.cpp has it in parts), and 50 MB of its own."""
    model = tmp_path / "some model.gguf"
    model.write_bytes(bytes(3 * mmap.PAGESIZE + 5))
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    with process:
        yield process, int(process.stdout.readline())
        process.stdin.close()


def test_memory_of_a_local_backend(child: tuple[subprocess.Popen[str], int]) -> None:
    process, port = child
    assert process_memory.listener(port) == process.pid
    found = process_memory.memory_of("localhost", port)
    assert found["model_file_bytes"] == 3 * mmap.PAGESIZE + 5
    assert found["process_rss_bytes"]
    assert 40_000_000 < found["process_rss_bytes"] < 200_000_000


@pytest.mark.parametrize("host", LOOPBACK)
def test_listener_is_found(host: str) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        assert process_memory.listener(sock.getsockname()[1]) == os.getpid()


def test_connection_is_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        client_port = client.getsockname()[1]
        assert process_memory.listener(client_port) is None
        client.close()


def test_unused_port_has_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert process_memory.listener(port) is None
    assert process_memory.memory_of("127.0.0.1", port) == {"process_rss_bytes": None, "model_file_bytes": None}


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("10.0.0.1", False),
     ("gpu-box", False), ("", False)],
)  # fmt: skip
def test_which_hosts_are_this_machine(host: str, local: bool) -> None:
    assert process_memory.is_local(host) is local


def test_memory_of_another_machine_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "listener", lambda port: pytest.fail("searched for a listener"))
    assert process_memory.memory_of("10.0.0.1", 80)["process_rss_bytes"] is None


def test_memory_of_a_dead_process_is_unknown(child: tuple[subprocess.Popen[str], int]) -> None:
    process, _ = child
    process.kill()
    process.wait()
    assert process_memory.rss(process.pid) is None
    assert process_memory.model_file(process.pid) is None


def test_file_closed_during_the_search_hides_no_listener(
    child: tuple[subprocess.Popen[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy server opens and closes files all the time."""
    process, port = child
    real = os.readlink
    first = sorted(Path(f"/proc/{process.pid}/fd").iterdir())[0]

    def readlink(path: str | os.PathLike[str]) -> str:
        if Path(path) == first:
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    assert process_memory.listener(port) == process.pid


def test_processes_of_other_users_are_skipped(
    child: tuple[subprocess.Popen[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: str | os.PathLike[str]) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(os, "readlink", forbidden)
    assert process_memory.listener(child[1]) is None
