"""Reloading the settings of a real process: on SIGHUP, and when a file changes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, get, post
from tests.support.server_process import Process, Streaming
from tests.support.waiting import wait_until
from xgen_proxy.api.api_keys import new_key
from xgen_proxy.config.fallback import FORMAT
from xgen_proxy.config.loading import ConfigError, ConfigSources, UnreadableError
from xgen_proxy.config.settings import BackendSettings, Routing, Settings
from xgen_proxy.gateway import Gateway
from xgen_proxy.reload import Reloader
from xgen_proxy.supervision import restarts

LONG_CHAT = {**CHAT, "messages": [{"role": "user", "content": "word " * 50}]}


class Configured:
    """A proxy that reads its settings from a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "xgen-proxy.toml"

    def write(self, **settings: Any) -> None:
        """Replace the file atomically, as editors and Kubernetes volumes do."""
        new = self.directory / "new"
        tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key not in tables]
        for table, values in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        new.write_text("\n".join(lines) + "\n")
        os.replace(new, self.file)

    def start(self, **environment: str) -> None:
        self.process = Process(self.directory, **environment)
        self.process.until_ready()

    def logged(self, text: str) -> bool:
        return any(text in line["message"] for line in self.process.lines())

    def chat(self, **fields: Any) -> Any:
        return post(f"{self.process.url}/v1/chat/completions", json={**CHAT, **fields})

    def replicas(self) -> dict[str, str]:
        status = get(f"{self.process.url}/models/status").json()
        return {replica["url"]: replica["state"] for backend in status["backends"] for replica in backend["replicas"]}

    def reloads(self, result: str) -> bool:
        return f'xgen_config_reloads_total{{result="{result}"}} 1.0' in get(f"{self.process.url}/metrics").text


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Configured]:
    made = Configured(tmp_path)
    yield made
    made.process.close()


def test_changed_file_changes_thresholds(proxy: Configured, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    backends = {
        "backends.vllm": {"urls": [gpu.url]},
        "backends.llama_cpp": {"urls": [cpu.url], "dialect": "vllm", "device_class": "cpu"},
    }
    proxy.write(**backends)
    proxy.start()
    wait_until(lambda: set(proxy.replicas().values()) == {"up"})
    assert proxy.chat(messages=LONG_CHAT["messages"]).headers["x-route-reason"].startswith("default")
    proxy.write(**backends, routing={"long_prompt_words": 20})
    wait_until(lambda: proxy.reloads("taken"))
    assert proxy.chat(messages=LONG_CHAT["messages"]).headers["x-route-reason"].startswith("long_prompt")
    assert proxy.logged("new settings (xgen-proxy.toml)")


def test_removed_replica_finishes_its_stream(proxy: Configured, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    proxy.write(**{"backends.vllm": {"urls": [gpu.url]}})
    proxy.start()
    streaming = Streaming(gpu)
    streaming.start(proxy.process.url)
    proxy.write(**{"backends.vllm": {"urls": [cpu.url]}})
    proxy.process.signal(signal.SIGHUP)
    wait_until(lambda: proxy.replicas() == {cpu.url: "up", gpu.url: "draining"})
    assert proxy.chat().headers["x-replica"] == f"vllm@127.0.0.1:{cpu.port}"
    streaming.release.set()
    streaming.thread.join(20)
    assert streaming.text.endswith("data: [DONE]\n\n")
    assert streaming.error is None


def test_backend_is_added_and_another_removed(proxy: Configured, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    proxy.write(**{"backends.one": {"urls": [gpu.url], "dialect": "vllm"}})
    proxy.start()
    proxy.write(**{"backends.two": {"urls": [cpu.url], "dialect": "vllm"}})
    wait_until(lambda: proxy.replicas() == {cpu.url: "up"})
    assert proxy.chat().headers["x-backend"] == "two"
    assert 'backend="one"' not in get(f"{proxy.process.url}/metrics").text.partition("xgen_requests_total")[0]


def test_api_keys_change(proxy: Configured, gpu: FakeUpstream) -> None:
    (old, old_hash), (new, new_hash) = new_key(), new_key()
    backends = {"backends.vllm": {"urls": [gpu.url]}}
    proxy.write(api_keys=[old_hash], **backends)
    proxy.start()

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return post(f"{proxy.process.url}/v1/chat/completions", json=CHAT, headers=headers).status_code

    assert (status(old), status(new)) == (200, 401)
    proxy.write(api_keys=[new_hash], **backends)
    proxy.process.signal(signal.SIGHUP)
    wait_until(lambda: status(new) == 200)
    assert status(old) == 401


@pytest.mark.parametrize("text", ["routing = [", "typo = 1\n", '[backends.vllm]\nurls = ["nonsense"]\n', ""])
def test_invalid_file_changes_nothing_and_is_logged(proxy: Configured, gpu: FakeUpstream, text: str) -> None:
    proxy.write(**{"backends.vllm": {"urls": [gpu.url]}})
    proxy.start()
    proxy.file.write_text(text)
    proxy.process.signal(signal.SIGHUP)
    wait_until(lambda: proxy.reloads("refused"))
    assert proxy.logged("the settings stay as they were (SIGHUP): ")
    assert proxy.chat().status_code == 200


def test_setting_that_needs_a_restart_is_logged(proxy: Configured, gpu: FakeUpstream) -> None:
    backends = {"backends.vllm": {"urls": [gpu.url]}}
    proxy.write(drain_s=30, **backends)
    proxy.start()
    proxy.write(drain_s=5, **backends)
    proxy.process.signal(signal.SIGHUP)
    wait_until(lambda: proxy.reloads("taken"))
    assert proxy.logged("drain_s is read at the start only")


def test_changed_secret_is_read_again(proxy: Configured, gpu: FakeUpstream, tmp_path: Path) -> None:
    (old, old_hash), (new, new_hash) = new_key(), new_key()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "xgen_api_keys").write_text(old_hash + "\n")
    (secrets / "xgen_backends__vllm__api_key").write_text("sk-engine\n")
    proxy.write(**{"backends.vllm": {"urls": [gpu.url]}})
    proxy.start(XGEN_SECRETS_DIR=str(secrets))

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return post(f"{proxy.process.url}/v1/chat/completions", json=CHAT, headers=headers).status_code

    assert (status(old), status(new)) == (200, 401)
    assert gpu.talks[0].headers["authorization"] == "Bearer sk-engine"
    (secrets / "xgen_api_keys").write_text(new_hash + "\n")
    wait_until(lambda: status(new) == 200)


# keys that vanish, and files that cannot be read


class Keyed(Configured):
    """A proxy whose keys are in a secrets directory."""

    def __init__(self, directory: Path, engine: FakeUpstream) -> None:
        super().__init__(directory)
        self.secrets = directory / "secrets"
        self.secrets.mkdir()
        self.keys = self.secrets / "xgen_api_keys"
        self.old, self.hash = new_key()
        self.keys.write_text(self.hash)
        self.write(**{"backends.vllm": {"urls": [engine.url]}})
        self.start(XGEN_SECRETS_DIR=str(self.secrets))

    def status(self, key: str | None) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return post(f"{self.process.url}/v1/chat/completions", json=CHAT, headers=headers).status_code

    def metric(self, name: str) -> float:
        page = get(f"{self.process.url}/metrics").text
        [line] = [line for line in page.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[1])


@pytest.fixture
def keyed(tmp_path: Path, gpu: FakeUpstream) -> Iterator[Keyed]:
    made = Keyed(tmp_path, gpu)
    yield made
    made.process.close()


def truncate(keyed: Keyed) -> None:
    keyed.keys.write_text("")


def remove(keyed: Keyed) -> None:
    keyed.keys.unlink()


def remove_the_folder(keyed: Keyed) -> None:
    shutil.rmtree(keyed.secrets)


def write_half(keyed: Keyed) -> None:
    keyed.keys.write_text(keyed.hash[:40])


def make_a_folder(keyed: Keyed) -> None:
    keyed.keys.unlink()
    keyed.keys.mkdir()


def make_a_dangling_link(keyed: Keyed) -> None:
    keyed.keys.unlink()
    keyed.keys.symlink_to("gone")


def rename(keyed: Keyed) -> None:
    keyed.keys.rename(keyed.secrets / "api_keys")


def write_no_text(keyed: Keyed) -> None:
    keyed.keys.write_bytes(b"\xff" * 64)


LOSSES = [truncate, remove, remove_the_folder, write_half, make_a_folder, make_a_dangling_link, rename, write_no_text]


def test_lost_keys_let_nobody_in(keyed: Keyed) -> None:
    for lose in LOSSES:
        assert (keyed.status(keyed.old), keyed.status(None)) == (200, 401)
        lose(keyed)
        keyed.process.signal(signal.SIGHUP)
        wait_until(lambda: keyed.metric("xgen_config_current") == 0, what=lose.__name__)
        assert (keyed.status(keyed.old), keyed.status(None), keyed.status("sk-wrong")) == (200, 401, 401), lose.__name__
        shutil.rmtree(keyed.secrets, ignore_errors=True)
        keyed.secrets.mkdir()
        keyed.keys.write_text(keyed.hash)
        keyed.process.signal(signal.SIGHUP)
        wait_until(lambda: keyed.metric("xgen_config_current") == 1, what=lose.__name__)
    assert keyed.logged("the settings stay as they were")
    assert keyed.logged("api_keys: set until now, and gone")
    assert not keyed.logged(keyed.hash)


def test_keys_are_given_up_only_in_words(keyed: Keyed) -> None:
    keyed.keys.write_text("none\n")
    wait_until(lambda: keyed.status(None) == 200)
    assert keyed.logged("api_keys says none: no key is asked for any more")


# As a file of another user's, which does not hold back root: it can be opened, and reading it is an OSError.
UNREADABLE = "/proc/self/mem"


@pytest.mark.parametrize("name", [".env", "xgen-proxy.toml"])
def test_the_watcher_survives_an_unreadable_file(keyed: Keyed, name: str) -> None:
    """A revoked key must not go on working because the watcher has died."""
    new, hash = new_key()
    file = keyed.directory / name
    text = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    file.symlink_to(UNREADABLE)
    wait_until(lambda: keyed.reloads("refused"))
    assert keyed.logged("cannot be read: Input/output error")
    keyed.keys.write_text(hash)
    file.unlink()
    file.write_text(text)
    wait_until(lambda: keyed.status(new) == 200)
    assert keyed.status(keyed.old) == 401
    assert keyed.metric("xgen_config_current") == 1


def test_a_lost_key_of_a_backend_is_kept(keyed: Keyed, gpu: FakeUpstream) -> None:
    secret = keyed.secrets / "xgen_backends__vllm__api_key"
    secret.write_text("sk-engine")
    wait_until(lambda: keyed.reloads("taken"))
    secret.unlink()
    wait_until(lambda: keyed.reloads("refused"))
    assert keyed.logged("backends.vllm.api_key: set until now, and gone")
    assert keyed.status(keyed.old) == 200
    assert gpu.talks[-1].headers["authorization"] == "Bearer sk-engine"


def test_a_proxy_that_others_can_reach_does_not_start_without_keys(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "xgen_proxy.cli", "serve", "--port", "0", "--host", "0.0.0.0"]
    command += ["--vllm", "http://127.0.0.1:1"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XGEN_")}
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "other machines can connect to 0.0.0.0" in done.stderr
    assert "XGEN_API_KEYS=none" in done.stderr


def test_a_proxy_without_keys_says_so(proxy: Configured, gpu: FakeUpstream) -> None:
    proxy.write(**{"backends.vllm": {"urls": [gpu.url]}})
    proxy.start()
    assert proxy.logged("no API key is asked for")


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    made = Gateway(Settings(backends={"vllm": {"urls": ["http://127.0.0.1:1"]}}))
    yield made
    await made.stop()


def reloader(gateway: Gateway, *loads: Any) -> Reloader:
    """Reads these settings one after the other; an exception is raised."""
    return Reloader(gateway, Mock(spec=ConfigSources, **{"load.side_effect": loads, "files.return_value": []}))


async def test_failed_reload_is_logged_and_the_next_one_applied(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reloading = reloader(gateway, gateway.settings, gateway.settings)
    with monkeypatch.context() as faulty:
        faulty.setattr(gateway.fleet, "configure", lambda _: 1 / 0)
        reloading.reload("test")
    assert "ZeroDivisionError" in caplog.text
    reloading.reload("test")
    assert gateway.metrics.reloads.values == {("refused",): 1, ("taken",): 1}


ERRORS = [ConfigError("x"), OSError(5, "x"), ValueError("x"), TypeError("x"), RecursionError("x"), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_any_error_while_reading_means_refused(gateway: Gateway, error: Exception) -> None:
    reloading = reloader(gateway, error)
    reloading.reload("test")
    assert gateway.metrics.reloads.values == {("refused",): 1, ("taken",): 0}
    assert b"xgen_config_current 0.0" in gateway.metrics.render()


async def test_an_unreadable_file_is_reported_once_and_read_again(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    error = UnreadableError("xgen_api_keys cannot be read: Too many open files")
    reloading = reloader(gateway, error, error, error, gateway.settings)
    for reason in ("a file", "a file", "SIGHUP", "a file"):
        reloading.reload(reason)
    assert gateway.metrics.reloads.values == {("refused",): 2, ("taken",): 1}
    assert caplog.text.count("Too many open files") == 2


async def test_settings_are_taken_whole_or_not_at_all(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second backend fails; the first one and the limits must not keep what they were given."""
    url = "http://127.0.0.1:1"
    old = Settings(backends={"a": {"urls": url, "dialect": "vllm"}, "b": {"urls": url, "dialect": "vllm"}})
    gateway.configure(old)
    first, second = gateway.fleet.backends
    real = second.configure

    def fail_with_new_slots(settings: BackendSettings, routing: Routing) -> None:
        if settings.slots:
            raise OSError(5, "the template is gone")
        real(settings, routing)

    monkeypatch.setattr(second, "configure", fail_with_new_slots)
    backends = {name: {"urls": url, "dialect": "vllm", "slots": 3} for name in ("a", "b")}
    with pytest.raises(OSError, match="the template is gone"):
        gateway.configure(Settings(backends=backends, limits={"queue": 7}, api_keys="none"))
    assert gateway.settings is gateway.fleet.settings is old
    assert [backend.settings.slots for backend in gateway.fleet.backends] == [None, None]
    assert gateway.fleet.backends == (first, second)
    assert gateway.admission.limit == old.limits.queue


async def test_the_watcher_is_started_again_when_it_fails(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By what no one has thought of: the files cannot even be looked at."""
    monkeypatch.setattr("xgen_proxy.reload.WATCH_INTERVAL_S", 0.0)
    monkeypatch.setattr("xgen_proxy.supervision.RESTART_PAUSE_S", 0.0)
    reloading = reloader(gateway, gateway.settings)
    before = restarts.get(("settings",), 0.0)
    looks = chain([RuntimeError("a bug")], repeat([Path(__file__)]))
    monkeypatch.setattr(reloading, "_sources", Mock(load=lambda: gateway.settings, files=Mock(side_effect=looks)))
    reloading.start()
    await asyncio.to_thread(wait_until, lambda: gateway.metrics.reloads.values[("taken",)])
    await reloading.stop()
    assert restarts[("settings",)] == before + 1
    assert "RuntimeError: a bug" in caplog.text
    assert f'xgen_background_restarts_total{{task="settings"}} {before + 1}'.encode() in gateway.metrics.render()


def test_a_process_supervises_its_tasks(keyed: Keyed) -> None:
    page = get(f"{keyed.process.url}/metrics").text
    for task in ("settings", "discovery", "watchdog"):
        assert f'xgen_background_restarts_total{{task="{task}"}} 0.0' in page


def test_a_changed_file_of_distances_is_read(proxy: Configured, gpu: FakeUpstream, cpu: FakeUpstream) -> None:
    """A malformed one changes nothing."""
    file = proxy.directory / "distance.json"

    def measured(top1: float) -> None:
        names = {"model": "m", "reference": {"backend": "vllm"}, "other": {"backend": "llama_cpp"}}
        new = proxy.directory / "new.json"
        new.write_text(json.dumps({"format": FORMAT, "pairs": [{**names, "all": {"top1": top1}}]}))
        os.replace(new, file)

    def candidates() -> list[str]:
        plan = post(f"{proxy.process.url}/route", json=CHAT).json()
        return [each["backend"] for each in plan["candidates"]]

    measured(0.97)
    backends = {
        "backends.vllm": {"urls": [gpu.url]},
        "backends.llama_cpp": {"urls": [cpu.url], "dialect": "vllm", "device_class": "cpu"},
    }
    proxy.write(**backends, fallback={"min_top1": 0.95, "distances": [str(file)]})
    proxy.start()
    wait_until(lambda: candidates() == ["vllm", "llama_cpp"])
    measured(0.9)
    wait_until(lambda: candidates() == ["vllm"])
    file.write_text("{")
    wait_until(lambda: proxy.reloads("refused"))
    assert candidates() == ["vllm"]
    assert proxy.logged("distance.json has no distances between models")
