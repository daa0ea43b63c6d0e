"""`xgen-proxy models …` as its user sees it: its output, its errors and its exit status."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy import cli
from xgen_proxy.models import directory
from xgen_proxy.models.pull import sources

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XGEN_MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments) → (exit status, standard output, standard error)"""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main(["models", *map(str, arguments)])
        except SystemExit as end:  # from argparse
            status = end.code if isinstance(end.code, int) else 1
        return (status, *capsys.readouterr())

    return run


@pytest.mark.parametrize("command", ["pull", "list", "inspect", "quantize"])
def test_help_teaches_by_examples(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "examples:" in out
    assert f"xgen-proxy models {command}" in out


def test_help_names_the_commands_and_the_folder(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "XGEN_MODELS_DIR" in out
    assert all(f"    {command} " in out for command in ("pull", "list", "inspect", "quantize"))


def test_pull_prints_the_path(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("pull", tiny_gguf(tmp_path / "tiny.gguf")) == (0, f"{folder / 'tiny.gguf'}\n", "")
    status, out, err = run("pull", "nothing-of-that-name")
    assert (status, out) == (1, "")
    assert err.startswith("xgen-proxy: 'nothing-of-that-name' is not a model")


def test_list(run: Run, folder: Path) -> None:
    assert run("list") == (0, f"no models in {folder}; `xgen-proxy models pull smollm2` fetches one\n", "")
    whole = tiny_gguf(folder / "a.gguf", template="{{ tools }}").read_bytes()
    status, out, err = run("list")
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split() == ["a.gguf", "0.0", "MB", "llama", "F16", "16.14", "1,024", "yes"]
    (folder / "b.gguf").write_bytes(whole[:-3000])
    status, out, err = run("list")
    assert status == 1
    assert "DAMAGED" in out
    assert "is cut short" in err


def test_list_of_another_folder_as_json(run: Run, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "a.gguf")
    status, out, _ = run("list", tmp_path, "--json")
    (model,) = json.loads(out)
    assert (status, model["model"]["architecture"]) == (0, "llama")
    (tmp_path / "list.json").write_text("old")
    os.link(tmp_path / "list.json", tmp_path / "old.json")
    status, out, _ = run("list", tmp_path, "--json", tmp_path / "list.json")
    assert (tmp_path / "old.json").read_text() == "old", "the file is renamed to its place"
    assert out.startswith("model")
    assert json.loads((tmp_path / "list.json").read_text()) == [model]


def test_inspect(run: Run, folder: Path) -> None:
    tiny_gguf(folder / "tiny.gguf")
    status, out, _ = run("inspect", "tiny", "--context", "512", "--slots", "2")
    assert status == 0
    assert "for 2 slots of 512 tokens" in out
    found = json.loads(run("inspect", "tiny", "--json")[1])
    assert found["memory_total"] == sum(found["memory"].values())
    assert found["fits"][0]["place"]["name"].startswith("RAM")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspect", "none"], 2, "there is no model none"),
        (["inspect", "none", "--context", "0"], 2, "not a number of at least 1"),
        (["quantize", "none", "--to", "q8_0"], 2, "there is no model none"),
        (["quantize", "none", "--to", "q9"], 2, "unknown type q9; known are f16, bf16, q8_0"),
        (["quantize", "none"], 2, "--to"),
        (["list", "/none"], 2, "cannot read the folder /none"),
        ([], 2, "usage: xgen-proxy models"),
    ],
)
def test_errors_say_what_to_do(run: Run, arguments: list[str], status: int, message: str) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (status, "")
    assert message in err


def test_quantize_reports_as_json(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp itself works in tests/e2e/test_models_quantize.py."""
    from xgen_proxy.models.files.gguf_file import read_gguf
    from xgen_proxy.models.quantize import quantization

    result = quantization.Quantized(read_gguf(tiny_gguf(folder / "tiny.gguf")), {})
    monkeypatch.setattr(quantization, "quantize", lambda *_, **__: iter([result]))
    assert json.loads(run("quantize", "tiny", "--to", "q8_0", "--json")[1])[0]["types"] == {"F16": 3, "F32": 2}
    assert "5 tensors: 3 F16, 2 F32" in run("quantize", "tiny", "--to", "Q8_0,q8_0")[1]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "m.gguf"), 1, "m.gguf: No space left on device; free some"),
        (ImportError("no", name="llama_cpp"), 2, "llama_cpp is not installed: pip install '.[models]' in a checkout"),
        (KeyboardInterrupt(), 130, "interrupted; no half-made file is left"),
    ],
)
def test_other_failures(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(directory, "entries", fail)
    found, out, err = run("list")
    assert (found, out) == (status, "")
    assert message in err


def test_an_interrupted_pull_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "pull", interrupt)
    assert run("pull", "m") == (130, "", "\ninterrupted; the same command goes on from there\n")


def test_sigterm_ends_a_command_as_ctrl_c_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(directory, "entries", end)
    assert run("list")[0] == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_serving_imports_no_model_library() -> None:
    names = ("llama_cpp", "gguf", "numpy", "matplotlib")
    code = f"import sys, xgen_proxy.cli as cli; cli.parser(); print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
