"""The process in which llama.cpp quantises: python -m xgen_proxy.models.quantize.worker, with a job as JSON on stdin.

Its standard output is llama.cpp's log. A process of its own, since llama.cpp cannot be interrupted and may crash.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from typing import Any

from xgen_proxy.models.quantize.importance import read_importance

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Exit status 0: the file is made, and llama.cpp loads it."""
    end_with_parent()
    job = json.load(sys.stdin)
    from llama_cpp import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: Any) -> None:
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()

    llama_cpp.llama_log_set(log, None)
    source, target = job["source"].encode(), job["target"].encode()
    parameters, kept = parameters_of(llama_cpp, job)
    if llama_cpp.llama_model_quantize(source, target, ctypes.byref(parameters)) != 0:
        return 1
    del kept
    return 0 if job["dry_run"] or loads(llama_cpp, target) else 1


def end_with_parent() -> None:
    """Makes Linux kill this process when the command ends for any reason. Other systems let it finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def parameters_of(llama_cpp: Any, job: dict[str, Any]) -> tuple[Any, list[Any]]:
    """llama.cpp's parameters, and the arrays that they point to."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, job["ftype"])
    parameters.nthread = job["threads"]
    parameters.allow_requantize = job["requantize"]
    parameters.dry_run = job["dry_run"]
    if not job["importance"]:
        return parameters, []
    importance = read_importance(Path(job["importance"]))
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # an empty one ends the list
    kept: list[Any] = [entries]
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        floats = (ctypes.c_float * len(values)).from_buffer_copy(values.astype("<f4").tobytes())
        entry.name, entry.size = name.encode(), len(values)
        entry.data = ctypes.cast(floats, ctypes.POINTER(ctypes.c_float))
        kept.append(floats)
    parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    return parameters, kept


def loads(llama_cpp: Any, path: bytes) -> bool:
    """Whether llama.cpp loads the file and finds its numbers valid. On the CPU: a GPU may be too small."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.check_tensors = True
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path, parameters)
    if model:
        llama_cpp.llama_model_free(model)
    return bool(model)


if __name__ == "__main__":
    sys.exit(main())
