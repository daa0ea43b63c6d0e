"""The process in which llama.cpp works: one job from its standard input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from tests.unit.models.quantize.test_importance import old_format


@pytest.mark.parametrize("importance", [False, True])
def test_a_dry_run_writes_nothing(tmp_path: Path, importance: bool) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf")
    matrix = str(old_format(tmp_path / "imatrix.dat")) if importance else None
    job = {
        "source": str(source), "target": str(tmp_path / "made.gguf"), "ftype": "LLAMA_FTYPE_MOSTLY_Q8_0", "threads": 1,
        "dry_run": True, "requantize": False, "importance": matrix,
    }  # fmt: skip
    command = [sys.executable, "-m", "xgen_proxy.models.quantize.worker"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
    assert "quant size" in done.stdout
    assert not (tmp_path / "made.gguf").exists()
