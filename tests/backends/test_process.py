"""The parts of `make run`, with small scripts in place of servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from backends import environment, local, models
from backends.environment import free_port, port_taken, usable_cores
from backends.local import Backend, LocalError, revive, wait_for
from backends.process import Child
from tests.support.processes import is_running
from tests.support.waiting import wait_until

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), grandchild.pid, flush=True)
time.sleep(600)
"""


Make = Callable[[str], Child]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """make(code): a child that runs this Python code, not yet started."""
    made: list[Child] = []

    def make(code: str) -> Child:
        made.append(Child("child", [sys.executable, "-c", code], tmp_path / "log"))
        return made[-1]

    yield make
    for child in made:
        child.stop(0)


def pids(child: Child) -> list[int]:
    """The process ids that STUBBORN prints: its own and its child's."""
    words = wait_until(lambda: child.log.read_text().split() if child.log.exists() else None)
    return [int(word) for word in words[1:]]


def test_stop_kills_stubborn_children_and_grandchildren(make: Make) -> None:
    child = make(STUBBORN)
    child.start()
    family = wait_until(lambda: pids(child))
    child.stop(0.1)
    wait_until(lambda: not any(is_running(pid) for pid in family))
    assert not child.alive


def test_stop_before_start_and_twice_is_harmless(make: Make) -> None:
    child = make("pass")
    child.stop(0)
    child.start()
    child.stop(5)
    child.stop(5)
    assert not child.alive


def test_a_child_leads_its_process_group(make: Make) -> None:
    child = make("import os; print('pids', os.getpid(), os.getpgid(0), flush=True)")
    child.start()
    assert child.process is not None
    assert pids(child) == [child.process.pid, child.process.pid]


def test_shell_variables_do_not_reach_the_servers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "HOST", "MODEL", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("XGEN_API_KEYS", "kept")
    child = make("import os; print(sorted(os.environ), flush=True)")
    child.start()
    names = wait_until(lambda: child.log.read_text())
    assert "'XGEN_API_KEYS'" in names
    assert "'PATH'" in names
    for name in ("PORT", "HOST", "MODEL", "PYTHONDONTWRITEBYTECODE"):
        assert f"'{name}'" not in names


def test_a_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from backends.process import Child
from tests.support.processes import is_running
from tests.support.waiting import wait_until
Child("child", [sys.executable, "-c", "import os,time; print('pids', os.getpid(), flush=True); time.sleep(600)"],
      Path({str(tmp_path / "log")!r})).start()
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        (child,) = wait_until(lambda: pids(Child("", [], tmp_path / "log")))
        assert is_running(child)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(child))


def test_last_lines_are_the_end_of_the_log(make: Make) -> None:
    child = make("print(*range(100), sep='\\n')")
    assert child.last_lines() == ""
    child.start()
    wait_until(lambda: not child.alive)
    assert child.last_lines().splitlines()[-1].endswith("99")
    assert len(child.last_lines().splitlines()) < 20


def test_waiting_ends_when_the_child_dies(make: Make) -> None:
    child = make("import sys; sys.exit('no such model')")
    child.start()
    with pytest.raises(LocalError, match=r"(?s)child died while starting.*no such model"):
        wait_for(child, lambda: None, "nothing")


def test_waiting_ends_when_time_is_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "START_S", 0.2)
    child = make("import time; time.sleep(600)")
    child.start()
    with pytest.raises(LocalError, match=r"waited 0\.2 s in vain for the sun"):
        wait_for(child, lambda: None, "the sun")


def test_pauses_between_restarts_grow(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    child = make("raise SystemExit(1)")
    starts: list[float] = []
    monkeypatch.setattr(child, "start", lambda: starts.append(now))
    backend = Backend(child, "http://127.0.0.1:1")
    backend.started = now
    while len(starts) < 7:
        revive(backend)
        now += 0.5
    pauses = [b - a for a, b in zip([1000.0, *starts], starts, strict=False)]
    assert pauses == sorted(pauses), "never faster than before"
    assert pauses[0] <= 2 < 30 <= pauses[-1] <= 32

    now = starts[-1] + local.SETTLED_S + 1  # it ran for long: the pauses start over
    count = len(starts)
    began = now
    while len(starts) == count:
        revive(backend)
        now += 0.5
    assert starts[-1] - began <= 2


def test_a_taken_port_is_reported_with_its_process() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = port_taken("127.0.0.1", taken.getsockname()[1])
    assert message is not None
    assert f"by process {os.getpid()} (" in message
    assert port_taken("127.0.0.1", free_port()) is None


def test_a_foreign_address_is_reported() -> None:
    message = port_taken("192.0.2.1", 8080)  # https://www.rfc-editor.org/rfc/rfc5737
    assert message is not None
    assert "192.0.2.1:8080" in message


def test_cores_follow_the_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {0}); from backends.environment import usable_cores as u; print(u())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({}, 8),
        ({"a/b": "max 100000"}, 8),
        ({"a/b": "350000 100000"}, 3),
        ({"a/b": "50000 100000"}, 1),
        ({"a": "200000 100000", "a/b": "400000 100000"}, 2),
        ({"": "100000 100000", "a/b": "max 100000"}, 1),
    ],
    ids=["no cgroups", "no quota", "three and a half", "half a core", "a smaller one outside", "a container's"],
)
def test_cores_follow_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quotas: dict[str, str], cores: int
) -> None:
    for name, quota in quotas.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "cpu.max").write_text(quota)
    monkeypatch.setattr(environment, "CGROUPS", tmp_path)
    monkeypatch.setattr(environment, "cgroups", lambda: [tmp_path / "a" / "b", tmp_path / "a", tmp_path])
    monkeypatch.setattr(environment, "siblings", str)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == cores


def test_our_cgroups_end_at_the_root_of_all() -> None:
    groups = environment.cgroups()
    assert groups[-1] == environment.CGROUPS
    assert all(inner.parent == outer for inner, outer in pairwise(groups))


def test_a_model_of_the_users_has_a_name_of_its_own() -> None:
    assert local.own_name(Path("/somewhere/qwen2.5-0.5b.gguf")) == "qwen2.5-0.5b"
    assert local.own_name(models.DEFAULT) == "smollm2"


def test_on_a_terminal_no_line_leaves_its_end_behind(make: Make) -> None:
    """Read back through a real terminal: what counts seconds is cleared before anything shorter is said."""
    code = """
import sys
import threading
from pathlib import Path
from backends.local import LocalError, say, wait_for
from backends.process import Child
from tests.support.processes import is_running
from tests.support.waiting import wait_until
child = Child("child", [sys.executable, "-c", ""], Path(sys.argv[1]))
child.start()
try:
    wait_for(child, lambda: None, "a very long line to end")
except LocalError:
    say("short")
"""
    leader, follower = os.openpty()
    done = subprocess.run([sys.executable, "-c", code, os.devnull], stderr=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "a very long line to end" in shown
    assert shown.endswith("\r\x1b[Kshort\r\n")


def test_signals_act_like_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        local.interrupt(signal.SIGTERM, None)


class Models(BaseHTTPRequestHandler):
    page = b'{"data": [{"id": "meta-llama/Llama-3.1-8B-Instruct"}]}'

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def vllm_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_cpus_model_is_served_under_the_gpus_name(vllm_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.name_on_gpu(vllm_url) == "meta-llama/Llama-3.1-8B-Instruct"
    assert local.name_on_gpu("") is None
    monkeypatch.setattr(Models, "page", b'{"data": []}')
    assert local.name_on_gpu(vllm_url) is None
    assert local.name_on_gpu(f"http://127.0.0.1:{free_port()}") is None


def test_model_names_in_settings_take_precedence(vllm_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_BACKENDS__LLAMA_CPP__MODELS", '{"chat": "smollm2"}')
    assert local.name_on_gpu(vllm_url) is None
