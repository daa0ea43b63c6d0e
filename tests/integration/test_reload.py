"""Reloading the settings of a real process: on SIGHUP, and when a file changes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.support.fake_upstream import FakeUpstream
from tests.support.running_proxy import CHAT, get, post
from tests.support.server_process import Process, Streaming
from tests.support.waiting import wait_until
from xgen_proxy.config.loading import ConfigSources
from xgen_proxy.config.settings import Settings
from xgen_proxy.downstream.api_keys import new_key
from xgen_proxy.gateway import Gateway
from xgen_proxy.reload import Reloader

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


async def test_failed_reload_is_logged_and_the_next_one_applied(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(backends={"vllm": {"urls": ["http://127.0.0.1:1"]}})
    gateway = Gateway(settings)
    sources = Mock(spec=ConfigSources, **{"load.return_value": settings, "files.return_value": []})
    reloader = Reloader(gateway, sources)
    with monkeypatch.context() as faulty:
        faulty.setattr(gateway.fleet, "configure", lambda _: 1 / 0)
        reloader.reload("test")
    assert "ZeroDivisionError" in caplog.text
    reloader.reload("test")
    assert gateway.metrics.reloads.values == {("refused",): 1, ("taken",): 1}
    await gateway.stop()
