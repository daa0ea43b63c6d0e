"""Quantising: what is refused before it starts, what llama.cpp's log tells, and that failures leave nothing.

tests/e2e/test_models.py quantises the real model.
"""

from __future__ import annotations

import shutil
import struct
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.gguf_bytes import gguf, string
from tests.support.tiny_gguf import tiny_gguf
from xgen_proxy.models.errors import ModelError, UsageError
from xgen_proxy.models.quantize import quantization
from xgen_proxy.models.quantize.quantization import FTYPES, Fallback, Log, quantize, target_of

LOG = """\
[   1/ 272] blk.0.attn_k.weight - [   576,    192,      1,      1], type =    f16, converting to q5_0 ..
warning: blk.0.attn_k.weight                  - ncols    576 not divisible by 256 (required for type    q4_K)
-> falling back to    q5_0
[ 272/ 272] blk.29.ffn_norm.weight
llama_model_quantize_impl: quant size  =    98.87 MiB (6.17 BPW)
llama_model_quantize: failed to quantize: basic_ios::clear: iostream error
"""


@pytest.mark.parametrize(
    ("source", "type", "target"),
    [
        ("model.f16.gguf", "q4_0", "model.Q4_0.gguf"),
        ("Model-1.7B-Q8_0.gguf", "q4_k_m", "Model-1.7B-Q4_K_M.gguf"),
        ("model.gguf", "f16", "model-F16.gguf"),
        ("model-hf", "q8_0", "model-hf-Q8_0.gguf"),
        ("m-BF16-00001-of-00002.gguf", "q8_0", "m-Q8_0.gguf"),
    ],
)
def test_names(source: str, type: str, target: str) -> None:
    assert target_of(Path(source), type, Path("out")) == Path("out", target)


def test_the_log() -> None:
    log = Log()
    assert [number for line in LOG.splitlines() if (number := log.read(line))] == [1, 272]
    assert log.fallbacks == {Fallback("Q4_K", "Q5_0", 576, 256): 1}
    assert log.size == int(98.87 * 2**20)
    assert log.cause == "basic_ios::clear: iostream error"


def test_every_type_is_llama_cpps() -> None:
    llama_cpp = pytest.importorskip("llama_cpp.llama_cpp")
    assert [name for name in FTYPES.values() if not hasattr(llama_cpp, name)] == []


def made(*arguments: Any, **options: Any) -> list[Path]:
    return [result.file.path for result in quantize(*arguments, **options)]


def test_a_quantised_source_is_refused(gguf: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"quantised already \(1 × Q8_0, 210 × Q4_1\).*--allow-requantize"):
        made(Path(gguf), ["q4_0"], tmp_path)


def test_a_part_that_is_quantised_is_refused(tmp_path: Path) -> None:
    first = tiny_gguf(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(
        gguf(tensors=[string("w") + struct.pack("<IQIQ", 1, 32, 8, 0)]) + bytes(100)
    )
    with pytest.raises(ModelError, match=r"quantised already \(1 × Q8_0\)"):
        made(first, ["q4_0"])


def test_a_result_is_not_replaced_unasked(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m-F16.gguf")
    (tmp_path / "m-Q8_0.gguf").write_text("dear to me")
    with pytest.raises(UsageError, match=r"m-Q8_0\.gguf exists; pass --force"):
        made(source, ["q4_0", "q8_0"])
    with pytest.raises(UsageError, match="would replace its source"):
        made(source, ["f16"], force=True)
    with pytest.raises(UsageError, match="there is no"):
        made(tmp_path / "none.gguf", ["f16"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-F16.gguf", "m-Q8_0.gguf"]


@pytest.mark.parametrize("source", [".", "../m/../m", "inner/.."])
def test_a_directory_without_a_name_has_that_of_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "m" / "inner").mkdir(parents=True)
    (tmp_path / "m-Q8_0.gguf").write_text("beside it")
    monkeypatch.chdir(tmp_path / "m")
    with pytest.raises(UsageError, match=r"m-Q8_0\.gguf exists"):
        made(Path(source), ["q8_0"])


def test_a_file_that_llama_cpp_cannot_load_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model lacks most tensors: llama.cpp quantises it and then refuses to load the result."""
    with pytest.raises(ModelError, match=r"llama\.cpp could not make q8_0: .*; nothing was kept"):
        made(tiny_gguf(tmp_path / "tiny.gguf"), ["q8_0"], threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    assert capsys.readouterr().err


def test_a_full_disk_is_seen_before_llama_cpp_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 67_108_864))
    with pytest.raises(ModelError, match=r"has 67 MB free, and tiny-Q8_0\.gguf needs"):
        made(source, ["q8_0"], threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(("code", "message"), [("kill -9 $$", "ended by signal 9"), ("exit 1", "its last words")])
def test_a_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    import subprocess

    @contextmanager
    def worker(*_: object) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(["sh", "-c", code], stdout=subprocess.PIPE, text=True) as process:
            yield process

    monkeypatch.setattr(quantization, "worker", worker)
    with pytest.raises(ModelError, match=message):
        made(tiny_gguf(tmp_path / "tiny.gguf"), ["q8_0"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
