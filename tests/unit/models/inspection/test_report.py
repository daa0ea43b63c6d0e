"""What `models inspect` says, and its verdict for each place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.gguf_bytes import gguf
from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.inspection import report as reports
from xgen_proxy.models.inspection.machine import Place
from xgen_proxy.models.inspection.report import inspect, report


def inspected(path: Path, monkeypatch: pytest.MonkeyPatch, available: int, context: int = 1024) -> str:
    monkeypatch.setattr(reports, "places", lambda: [Place("RAM", 10**11, available)])
    return report(inspect(path, context, 2, "f16"))


def test_a_model_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspected(tiny_gguf(tmp_path / "tiny.gguf"), monkeypatch, 10**10)
    assert "llama, 2 layers, width 64, 4 heads, 2 for keys and values" in text
    assert "for 2 slots of 1,024 tokens, the most that the model allows: weights" in text
    assert "fits          RAM: 10.0 GB of 100.0 GB are free" in text
    assert "none: it is no chat model" in text


def test_a_cache_that_may_be_smaller_is_an_upper_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspected(tiny_gguf(tmp_path / "tiny.gguf", attention__sliding_window=512), monkeypatch, 10**10)
    assert "KV cache (f16) at most" in text
    assert "memory        at most" in text
    assert "at most" not in inspected(tiny_gguf(tmp_path / "plain.gguf"), monkeypatch, 10**10)


def test_a_smaller_context_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    need = inspect(path, 768, 2, "f16").memory.total
    text = inspected(path, monkeypatch, need)
    assert "DOES NOT FIT  RAM" in text
    assert "--context 768 would fit" in text


def test_a_model_that_does_not_tell_its_kv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf())
    text = inspected(path, monkeypatch, 10**10)
    assert re.search(r"memory +more than [\d.]+ MB for .* KV cache \(f16\) unknown,", text)
    assert "may fit       RAM: 10.0 GB of 100.0 GB are free; the file does not tell how large its KV cache is" in text
    assert "DOES NOT FIT  RAM" in inspected(path, monkeypatch, 1000)


def test_it_fits_in_no_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspected(tiny_gguf(tmp_path / "tiny.gguf"), monkeypatch, 1000)
    assert "use a smaller quantisation (`xgen-proxy models quantize`) or a smaller model" in text


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ tools }}", "it knows tools"), ("x", "it knows no tools"), ("{% x", "cannot be told")],
)
def test_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, said: str) -> None:
    assert said in inspected(tiny_gguf(tmp_path / "tiny.gguf", template=template), monkeypatch, 10**10)
