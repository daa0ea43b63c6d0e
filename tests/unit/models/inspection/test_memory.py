"""The estimate of memory, and a real llama.cpp's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.inspection.description import describe
from xgen_proxy.models.inspection.memory import estimate, kv_bytes_per_token, largest_context

TOLERANCE = 0.15
CONTEXT = 768
# What `make run` starts, without its HTTP server: load the model, fill the context, tell the resident memory.
PROGRAM = """
import sys, psutil
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_threads=1, n_threads_batch=1, verbose=False)
llama.eval([5] * (int(sys.argv[2]) - 1))
print(psutil.Process().memory_info().rss)
"""


def test_a_real_llama_cpp_needs_what_is_estimated(gguf: str) -> None:
    command = [sys.executable, "-c", PROGRAM, gguf, str(CONTEXT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert estimate(describe(Path(gguf)), CONTEXT).total == pytest.approx(int(done.stdout), rel=TOLERANCE)


def test_the_kv_cache(gguf: str) -> None:
    """30 layers with 3 heads of 64 numbers for keys and for values."""
    model = describe(Path(gguf))
    assert kv_bytes_per_token(model) == 30 * 3 * 2 * 64 * 2
    assert kv_bytes_per_token(model, "q8_0") == 30 * 3 * 2 * 64 * 34 / 32
    assert estimate(model, 2048, 4).kv_cache == 4 * 2048 * kv_bytes_per_token(model)
    assert estimate(model, 10**6) == estimate(model, 8192), "the model allows no more"


def test_the_largest_context_that_fits(tmp_path: Path) -> None:
    model = describe(tiny_gguf(tmp_path / "tiny.gguf"))
    need = estimate(model, 768, 2)
    found = largest_context(model, need.total, 2)
    assert found == 768
    assert largest_context(model, need.total * 10, 2) == 1024, "the model's own"
    assert largest_context(model, need.weights, 2) is None
