"""With a stand-in for NVML, since most machines have none."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from xgen_proxy.fleet.details import gpus
from xgen_proxy.fleet.details.gpus import Gpu, GpuReader, NvmlMemory, read_gpus

GIB = 2**30


class Nvml:
    """Two GPUs, of which the second is divided by MIG."""

    def __init__(self, count: int = 2, error: int = 0) -> None:
        self.count, self.error = count, error

    def nvmlInit_v2(self) -> int:
        return self.error

    def nvmlDeviceGetCount_v2(self, number: Any) -> int:
        ctypes.cast(number, ctypes.POINTER(ctypes.c_uint))[0] = self.count
        return self.error

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = index + 1
        return 0 if index < 2 else 15  # NVML_ERROR_GPU_IS_LOST

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, name: Any, length: int) -> int:
        name.value = b"NVIDIA H100"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        if handle.value == 2:
            return 4  # NVML_ERROR_NO_PERMISSION
        ctypes.cast(memory, ctypes.POINTER(NvmlMemory))[0] = NvmlMemory(total=80 * GIB, free=8 * GIB, used=72 * GIB)
        return 0


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    gpus.nvml.cache_clear()
    yield
    gpus.nvml.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)


def test_memory_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Nvml())
    assert read_gpus() == [Gpu("NVIDIA H100", 72 * GIB, 80 * GIB), Gpu("NVIDIA H100", None, None)]


def test_a_lost_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Nvml(count=3))
    assert len(read_gpus() or []) == 2


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert read_gpus() is None


@pytest.mark.parametrize("library", [Nvml(error=9), object()], ids=["driver not loaded", "another library"])
def test_a_driver_that_does_not_work(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    install(monkeypatch, library)
    assert read_gpus() is None


async def test_a_driver_that_hangs_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    began: list[int] = []

    def hangs() -> list[Gpu]:
        began.append(1)
        go_on.wait(30)
        return []

    monkeypatch.setattr(gpus, "read_gpus", hangs)
    monkeypatch.setattr(gpus, "TIME_LIMIT_S", 0.05)
    reader = GpuReader()
    assert all(found is None for found in await asyncio.gather(*(reader.read() for _ in range(3))))
    assert len(began) == 1
    go_on.set()
