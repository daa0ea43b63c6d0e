from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from xgen_proxy.fleet.memory import ram
from xgen_proxy.fleet.memory.pressure import Room

MIB = 1024**2
PORT = 12345


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 GiB with 4 GiB left; the cgroups of process 42 are for the test to write."""
    monkeypatch.setattr(ram, "PROC", tmp_path / "proc")
    monkeypatch.setattr(ram, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8192 * MIB, available=4096 * MIB))
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid == 42)
    monkeypatch.setattr(ram, "listeners", lambda: {PORT: 42})
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{text}\n")


def in_cgroup(kernel: Path, lines: str) -> None:
    write(kernel / "proc" / "42", cgroup=lines)


def test_version_2_with_the_limit_of_a_folder_above(kernel: Path) -> None:
    in_cgroup(kernel, "0::/pod/engine")
    write(kernel / "cgroup", cgroup_controllers="memory")
    stat = f"anon {700 * MIB}\nactive_file {100 * MIB}\ninactive_file {50 * MIB}\nslab_reclaimable {10 * MIB}"
    write(kernel / "cgroup" / "pod", memory_max=1024 * MIB, memory_current=1000 * MIB, memory_stat=stat)
    write(kernel / "cgroup" / "pod" / "engine", memory_max="max", memory_current=900 * MIB, memory_stat=stat)
    assert ram.LocalRooms().read([PORT]) == {PORT: Room(184 * MIB, 1024 * MIB, "its cgroup")}


def test_version_1_in_a_container_which_sees_its_own_folder_at_the_top(kernel: Path) -> None:
    in_cgroup(kernel, "9:name=systemd:/docker/1\n4:cpu,memory:/docker/1\n0::/")
    stat = f"cache 1\ntotal_cache 1\ntotal_active_file {MIB}\ntotal_inactive_file {MIB}"
    files = {"memory_limit_in_bytes": 1024 * MIB, "memory_usage_in_bytes": 1000 * MIB, "memory_stat": stat}
    write(kernel / "cgroup" / "memory", **files)
    assert ram.LocalRooms().read([PORT]) == {PORT: Room(26 * MIB, 1024 * MIB, "its cgroup")}


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "x", "0"])
def test_without_a_limit_the_machine_counts(kernel: Path, limit: str) -> None:
    in_cgroup(kernel, "0::/engine")
    write(kernel / "cgroup" / "engine", memory_max=limit, memory_current=1, memory_stat="anon 1")
    assert ram.LocalRooms().read([PORT]) == {PORT: Room(4096 * MIB, 8192 * MIB, "this machine")}


@pytest.mark.parametrize("stat", ["", "active_file", "active_file 1"])
def test_what_cannot_be_read_has_no_effect(kernel: Path, stat: str) -> None:
    in_cgroup(kernel, "0::/engine")
    write(kernel / "cgroup" / "engine", memory_max=MIB, memory_current=MIB, memory_stat=stat)
    assert ram.LocalRooms().read([PORT, PORT + 1]) == dict.fromkeys([PORT, PORT + 1], ram.machine_room())


def test_a_process_of_another_namespace(kernel: Path) -> None:
    in_cgroup(kernel, "0::/../../other")
    assert ram.LocalRooms().read([PORT]) == {PORT: ram.machine_room()}


def test_processes_are_searched_for_rarely(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []

    def listeners() -> dict[int, int]:
        searches.append(1)
        return {PORT: 42}

    monkeypatch.setattr(ram, "listeners", listeners)
    rooms = ram.LocalRooms()
    for _ in range(5):
        rooms.read([PORT, PORT + 1])  # one of them is never found
    assert len(searches) == 1


def test_on_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        rooms = ram.LocalRooms()
        assert 0 < rooms.read([port])[port].left <= psutil.virtual_memory().total
        assert rooms._pids[port] == os.getpid()
