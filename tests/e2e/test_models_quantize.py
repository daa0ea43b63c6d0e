"""`xgen-proxy models quantize` of the real model: right, whole, or nothing."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.tiny_gguf import tiny_gguf
from tests.support.waiting import wait_until
from xgen_proxy.models.files.gguf_file import read_gguf


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "xgen_proxy.cli", "models", "quantize", *map(str, arguments), "--threads", "1"]


def quantize(
    *arguments: object, prepare: Callable[[], None] | None = None, status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, preexec_fn=prepare, check=False)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def f16(gguf: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's 4-bit weights as f16."""
    folder = tmp_path_factory.mktemp("f16")
    quantize(gguf, "--to", "f16", "--allow-requantize", "--out", folder)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def plain(f16: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of results with their report, and what the command printed."""
    folder = tmp_path_factory.mktemp("plain")
    done = quantize(f16, "--to", "q4_0,q4_k_m", "--out", folder, "--json", folder / "report.json")
    return folder, done.stdout


def test_types_and_fallbacks_are_told(plain: tuple[Path, str]) -> None:
    folder, out = plain
    assert "166 tensors are Q5_0 instead of Q4_K: their rows have 576 weights, no multiple of 256" in out
    legacy, k_quant = json.loads((folder / "report.json").read_text())
    assert sum(each["tensors"] for each in k_quant["fallbacks"]) == 180
    assert legacy["types"] == {"F32": 61, "Q4_0": 210, "Q8_0": 1}
    assert 5 < legacy["bits_per_weight"] < k_quant["bits_per_weight"] < 7
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["SmolLM2-135M-Instruct.Q4_0.gguf", "SmolLM2-135M-Instruct.Q4_K_M.gguf", "report.json"]


def test_an_importance_matrix_changes_the_weights(f16: Path, plain: tuple[Path, str], tmp_path: Path) -> None:
    import gguf as library
    import numpy

    writer = library.GGUFWriter(tmp_path / "imatrix.gguf", "imatrix")
    columns = numpy.random.default_rng(1)
    for tensor in read_gguf(f16).tensors:
        if len(tensor.shape) == 2:
            sums = columns.uniform(0.1, 10, (1, tensor.shape[0])).astype(numpy.float32)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", numpy.ones((1, 1), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize(f16, "--to", "q4_0", "--out", tmp_path / "weighed", "--imatrix", tmp_path / "imatrix.gguf")
    (weighed,) = (tmp_path / "weighed").iterdir()
    without = plain[0] / weighed.name
    assert weighed.read_bytes()[-1_000_000:] != without.read_bytes()[-1_000_000:]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_command_leaves_nothing(f16: Path, tmp_path: Path, number: int, status: int) -> None:
    """SIGKILL leaves a scratch folder, which the next command removes."""
    for attempt in range(5):  # on a fast machine the command may be done before the signal arrives
        out = tmp_path / f"out-{attempt}"
        process = subprocess.Popen(command(f16, "--to", "q4_k_m", "--out", out), stderr=subprocess.PIPE, text=True)
        wait_until(lambda: any(each.stat().st_size for each in out.glob(".unfinished-*/*.gguf")), 60)  # noqa: B023
        workers = psutil.Process(process.pid).children()
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        if process.returncode != 0:
            break
    assert process.returncode == status
    psutil.wait_procs(workers, 10)
    assert [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE] == []
    if number == signal.SIGKILL:
        quantize(tiny_gguf(out / "tiny.gguf"), "--to", "q8_0", status=1)
        (out / "tiny.gguf").unlink()
    else:
        assert "no half-made file is left" in err
    assert list(out.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(f16: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails the write in the same place."""
    limit = 30 * 2**20
    done = quantize(
        f16, "--to", "q8_0", "--out", tmp_path, status=1,
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert "xgen-proxy: llama.cpp could not make q8_0" in done.stderr
    assert "nothing was kept" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_cut_source_is_refused(f16: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(f16.read_bytes()[:-1_000_000])
    done = quantize(tmp_path / "cut.gguf", "--to", "q8_0", status=1)
    assert "is cut short" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_a_hugging_face_directory(vllm_model: str, converter: str, tmp_path: Path) -> None:
    """By llama.cpp's own converter."""
    quantize(vllm_model, "--to", "f16", "--out", tmp_path, "--converter", converter)
    (made,) = tmp_path.iterdir()
    assert read_gguf(made).types() == {"F16": 211, "F32": 61}
