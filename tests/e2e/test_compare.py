"""`models compare` with real models: SmolLM2 as f16, made from the Q4_1 file, and as Q8_0 and Q4_0; a few tokens."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

QUICK = ("--context", "64", "--windows", "2", "--repeat", "1", "--answers", "3", "--threads", "1")
KINDS = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def quantised(source: Path, target: Path, kind: int) -> Path:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = kind, 1, True
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) == 0
    return target


@pytest.fixture(scope="module")
def models(gguf: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = quantised(Path(gguf), folder / "smollm2-F16.gguf", KINDS["F16"])
    others = {kind: quantised(base, folder / f"smollm2-{kind}.gguf", KINDS[kind]) for kind in ("Q8_0", "Q4_0")}
    return {"F16": base, **others}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xgen_proxy.cli", "models", "compare", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def compared(models: dict[str, Path]) -> tuple[dict[str, Any], str]:
    """The result file, and what was printed."""
    file = models["F16"].with_name("result.json")
    done = run(*models.values(), *QUICK, "--json", file)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no bar without a terminal, and nothing of llama.cpp's"
    return json.loads(file.read_text()), done.stdout


def test_more_bits_are_nearer_to_the_base(compared: tuple[dict[str, Any], str]) -> None:
    base, eight, four = compared[0]["models"]
    assert [model["name"] for model in (base, eight, four)] == ["F16", "Q8_0", "Q4_0"]
    for text in ("english", "korean", "code", "all"):
        assert base["texts"][text]["kld"] == 0
        assert 0 < eight["texts"][text]["kld"] < four["texts"][text]["kld"]
        assert eight["texts"][text]["perplexity"] == pytest.approx(base["texts"][text]["perplexity"], rel=0.1)
    assert base["texts"]["all"]["same_top"] == 1
    assert eight["texts"]["all"]["same_top"] > four["texts"]["all"]["same_top"]


def test_sizes_and_memory_are_plausible(compared: tuple[dict[str, Any], str]) -> None:
    base, eight, four = compared[0]["models"]
    assert base["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert eight["bits_per_weight"] == pytest.approx(8.5, abs=0.1)
    assert base["rss_bytes_no_mmap"]["median"] > base["size_bytes"]
    assert four["rss_bytes_no_mmap"]["median"] < base["rss_bytes_no_mmap"]["median"]
    assert all(model["generated_tokens_per_s"]["median"] > 0 for model in (base, eight, four))


def test_the_table_fits_and_ends_with_advice(compared: tuple[dict[str, Any], str]) -> None:
    printed = compared[1]
    assert max(map(len, printed.splitlines())) <= 120
    assert re.search(r"is the smallest that keeps|^None keeps", printed, re.MULTILINE)


def test_a_model_whose_weights_are_no_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    """Its header is right: only running it shows the damage."""
    damaged = tmp_path / "damaged.gguf"
    data = bytearray(models["Q8_0"].read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    damaged.write_bytes(data)
    done = run(damaged, "--base", models["F16"], *QUICK)
    assert done.returncode != 0
    assert f"{damaged}: window: what it says is not a number" in done.stderr
