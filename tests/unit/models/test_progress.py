"""The progress bar: on terminals only, and it ends without a trace."""

from __future__ import annotations

import sys

import pytest

from xgen_proxy.models.progress import Progress


def test_it_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("m.gguf", 100)
    progress.update(50)
    progress.end("done")
    assert capsys.readouterr() == ("", "done\n")


@pytest.mark.parametrize(
    ("total", "unit", "expected"),
    [
        (2_000_000, "bytes", "m.gguf [###############...............]  50%  1.0 MB"),
        (None, "bytes", "m.gguf  1.0 MB"),
        (2_000_000, "tensors", "m.gguf [###############...............]  50%  1000000 tensors"),
    ],
)
def test_it_draws_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int | None, unit: str, expected: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("m.gguf", total, unit)
    progress.update(1_000_000)
    progress.end()
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.endswith("\r\033[K")
