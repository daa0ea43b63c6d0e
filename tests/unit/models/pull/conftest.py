from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tenacity import wait_none

from tests.support.scripted_hub import Hub, scripted_hub
from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.pull import download


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """HF_ENDPOINT leads to it, and nobody waits between two tries."""
    with scripted_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "no-such-home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(download, "wait_exponential", wait_none)
        yield running


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A GGUF file's bytes."""
    return tiny_gguf(tmp_path / "source.gguf").read_bytes()
