"""The estimate of memory, and a real llama.cpp's."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gguf_bytes import gguf, key_value, string
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
    per_token = 30 * 3 * 2 * 64 * 2
    assert kv_bytes_per_token(model) == per_token
    assert kv_bytes_per_token(model, "q8_0") == 30 * 3 * 2 * 64 * 34 / 32
    assert estimate(model, 2048, 4).kv_cache == 4 * 2048 * per_token
    assert estimate(model, 10**6) == estimate(model, 8192), "the model allows no more"


def test_the_kv_cache_of_many_layers_that_differ(tmp_path: Path) -> None:
    """As Llama-3.1-Nemotron-Ultra, which has 162 layers and some without attention."""
    layers = 162
    kv_heads = struct.pack(f"<IQ{layers}I", 4, layers, *[0, 8] * (layers // 2))
    heads = struct.pack(f"<IQ{layers}I", 4, layers, *[0, 128] * (layers // 2))
    numbers = {"block_count": layers, "embedding_length": 16384, "context_length": 4096}
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf(
            key_value("general.architecture", 8, string("deci")),
            *(key_value(f"deci.{key}", 4, struct.pack("<I", value)) for key, value in numbers.items()),
            key_value("deci.attention.head_count", 9, heads),
            key_value("deci.attention.head_count_kv", 9, kv_heads),
        )
    )
    assert kv_bytes_per_token(describe(path)) == layers // 2 * 8 * (128 + 128) * 2


def test_the_largest_context_that_fits(tmp_path: Path) -> None:
    model = describe(tiny_gguf(tmp_path / "tiny.gguf"))
    need = estimate(model, 768, 2)
    found = largest_context(model, need.total, 2)
    assert found == 768
    assert largest_context(model, need.total * 10, 2) == 1024, "the model's own"
    assert largest_context(model, need.weights, 2) is None
