"""The processes of `make run`, one by one, with small scripts for servers."""

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

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), grandchild.pid, flush=True)
time.sleep(600)
"""


def until(look: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
    """What STUBBORN says of itself and its grandchild."""
    words = until(lambda: child.log.exists() and child.log.read_text().split())
    return [int(word) for word in words[1:]]


def test_stop_ends_the_stubborn_and_their_children(make: Make) -> None:
    child = make(STUBBORN)
    child.start()
    family = until(lambda: pids(child))
    child.stop(0.1)
    until(lambda: not any(runs(pid) for pid in family))
    assert not child.alive


def test_stop_is_harmless_before_the_start_and_twice(make: Make) -> None:
    child = make("pass")
    child.stop(0)
    child.start()
    child.stop(5)
    child.stop(5)
    assert not child.alive


def test_a_child_leads_its_group_and_keeps_its_pid_through_the_shim(make: Make) -> None:
    child = make("import os; print('pids', os.getpid(), os.getpgid(0), flush=True)")
    child.start()
    assert child.process is not None
    assert pids(child) == [child.process.pid, child.process.pid]


def test_settings_of_the_shell_do_not_reach_the_servers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "HOST", "MODEL", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("XGEN_API_KEYS", "kept")
    child = make("import os; print(sorted(os.environ), flush=True)")
    child.start()
    names = until(lambda: child.log.read_text())
    assert "'XGEN_API_KEYS'" in names
    assert "'PATH'" in names
    for name in ("PORT", "HOST", "MODEL", "PYTHONDONTWRITEBYTECODE"):
        assert f"'{name}'" not in names


def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from backends.process import Child
Child("child", [sys.executable, "-c", "import os,time; print('pids', os.getpid(), flush=True); time.sleep(600)"],
      Path({str(tmp_path / "log")!r})).start()
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        (child,) = until(lambda: pids(Child("", [], tmp_path / "log")))
        assert runs(child)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not runs(child))


def test_the_last_words_are_the_last(make: Make) -> None:
    child = make("print(*range(100), sep='\\n')")
    assert child.last_lines() == ""
    child.start()
    until(lambda: not child.alive)
    assert child.last_lines().splitlines()[-1].endswith("99")
    assert len(child.last_lines().splitlines()) < 20


def test_waiting_ends_with_the_child(make: Make) -> None:
    child = make("import sys; sys.exit('no such model')")
    child.start()
    with pytest.raises(LocalError, match=r"(?s)child died while starting.*no such model"):
        wait_for(child, lambda: None, "nothing")


def test_waiting_ends_with_the_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "START_S", 0.2)
    child = make("import time; time.sleep(600)")
    child.start()
    with pytest.raises(LocalError, match=r"waited 0\.2 s in vain for the sun"):
        wait_for(child, lambda: None, "the sun")


def test_restarts_come_slower_and_slower(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(local.time, "monotonic", lambda: now)
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

    now = starts[-1] + local.SETTLED_S + 1  # it ran well for long: the next pause is a first one
    count = len(starts)
    began = now
    while len(starts) == count:
        revive(backend)
        now += 0.5
    assert starts[-1] - began <= 2


def test_a_taken_port_names_its_holder() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = port_taken("127.0.0.1", taken.getsockname()[1])
    assert told is not None
    assert f"by process {os.getpid()} (" in told
    assert port_taken("127.0.0.1", free_port()) is None


def test_an_address_that_is_not_here_is_told() -> None:
    told = port_taken("192.0.2.1", 8080)  # https://www.rfc-editor.org/rfc/rfc5737
    assert told is not None
    assert "192.0.2.1:8080" in told


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
    ids=["no cgroups", "no quota", "three and a half", "half a core", "a narrower one around", "a container's"],
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


def test_signals_end_it_as_ctrl_c_does() -> None:
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


def test_the_cpus_model_goes_by_the_gpus_name(vllm_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local.name_on_gpu(vllm_url) == "meta-llama/Llama-3.1-8B-Instruct"
    assert local.name_on_gpu("") is None
    monkeypatch.setattr(Models, "page", b'{"data": []}')
    assert local.name_on_gpu(vllm_url) is None
    assert local.name_on_gpu(f"http://127.0.0.1:{free_port()}") is None


def test_names_that_settings_map_are_left_alone(vllm_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XGEN_BACKENDS__LLAMA_CPP__MODELS", '{"chat": "smollm2"}')
    assert local.name_on_gpu(vllm_url) is None
