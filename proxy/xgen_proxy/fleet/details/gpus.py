"""The memory of this machine's GPUs, through NVML, the library of NVIDIA's driver.

vLLM reports no memory of its GPU. NVML is there wherever the driver is, so nothing has to be installed, and a reading
takes a millisecond; nvidia-smi, which asks the same library, takes a second to start.
https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from dataclasses import asdict
from functools import cache
from typing import Any

from xgen_proxy.values import frozen

TIME_LIMIT_S = 2.0  # NVML blocks while a driver hangs
MAX_GPUS = 64
NAME_BYTES = 96
OK = 0


@frozen
class Gpu:
    """Bytes; None if NVML does not tell, as for a GPU that is divided by MIG."""

    name: str
    used_bytes: int | None
    total_bytes: int | None


class NvmlMemory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class GpuReader:
    """One reading at a time, so that a driver that hangs holds one thread, not one for each question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def read(self) -> list[dict[str, Any]] | None:
        """None if there is no NVML, or if it does not answer in time."""
        try:
            async with asyncio.timeout(TIME_LIMIT_S):
                gpus = await asyncio.to_thread(self._read_alone)
        except TimeoutError:
            return None
        return [asdict(gpu) for gpu in gpus] if gpus is not None else None

    def _read_alone(self) -> list[Gpu] | None:
        if not self._lock.acquire(timeout=TIME_LIMIT_S):
            return None
        try:
            return read_gpus()
        finally:
            self._lock.release()


@cache
def nvml() -> ctypes.CDLL | None:
    """None if this machine has no NVIDIA driver, or none that works."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == OK else None
    except (OSError, AttributeError):
        return None


def read_gpus() -> list[Gpu] | None:
    library = nvml()
    number = ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(number)) != OK:
        return None
    gpus = []
    for index in range(min(number.value, MAX_GPUS)):
        handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(NAME_BYTES), NvmlMemory()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != OK:
            continue
        library.nvmlDeviceGetName(handle, name, NAME_BYTES)
        told = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == OK
        used, total = (memory.used, memory.total) if told else (None, None)
        gpus.append(Gpu(name.value.decode("utf-8", "replace"), used, total))
    return gpus
