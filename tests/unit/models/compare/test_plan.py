"""What is compared with what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xgen_proxy.gguf.header import GgufFile, Tensor
from xgen_proxy.models.compare.plan import Plan, choose_base, default_threads, names, need_memory
from xgen_proxy.models.errors import ModelError


def file(name: str, size: int, bits: int = 8) -> GgufFile:
    tensor = Tensor("weights", "F16", (size // bits * 8,), size, size)
    return GgufFile(Path(name), size, {}, (tensor,))


def test_names_leave_out_the_common_start() -> None:
    paths = [Path(f"a/SmolLM2-135M.{kind}.gguf") for kind in ("Q4_K_M", "Q4_0", "F16")]
    assert names(paths) == ["Q4_K_M", "Q4_0", "F16"]
    assert names([Path("f16.gguf"), Path("q8_0.gguf")]) == ["f16", "q8_0"]
    assert names([Path("model-Q4_0.gguf")]) == ["model-Q4_0"]


def test_files_of_the_same_name_are_told_by_their_paths() -> None:
    assert names([Path("a/m.gguf"), Path("b/m.gguf")]) == ["a/m.gguf", "b/m.gguf"]


def test_a_file_is_compared_once() -> None:
    with pytest.raises(ModelError, match="named twice"):
        names([Path("a.gguf"), Path("./a.gguf")])


def test_the_base_has_the_most_bits_per_weight() -> None:
    assert choose_base([file("q4", 9_000, 4), file("f16", 8_000, 16), file("q8", 9_500, 8)]) == Path("f16")


def test_models_that_do_not_fit_together_are_refused() -> None:
    files = [file("a", 4_000_000_000), file("b", 8_000_000_000)]
    need_memory(files, 13e9)
    with pytest.raises(ModelError, match=r"the 2 models need 12\.6 GB of memory together and 8\.0 GB are free"):
        need_memory(files, 8e9)


def test_half_a_window_is_read_and_an_eighth_generated() -> None:
    plan = Plan(models=(), base=Path("a"), threads=1)
    assert (plan.prompt_tokens, plan.generated_tokens) == (256, 64)


def test_threads_are_cores() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
