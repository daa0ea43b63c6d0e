"""quantize(): a GGUF file or a Hugging Face directory in, one GGUF file for each wanted type out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, cast

from xgen_proxy.gguf.header import GgufFile
from xgen_proxy.models.errors import ModelError, ModelFileError, UsageError
from xgen_proxy.models.files.gguf_file import read_gguf, read_model
from xgen_proxy.models.progress import Progress, say
from xgen_proxy.models.quantize.converter import convert, find_converter
from xgen_proxy.models.quantize.importance import read_importance
from xgen_proxy.models.storage import MARGIN, UNFINISHED, alone_in, free_space, make_folder, need_space, publish
from xgen_proxy.values import frozen

# What users write → llama.cpp's name. The K types are mixtures: M gives the tensors that matter more a better type.
FTYPES = {
    name: f"LLAMA_FTYPE_MOSTLY_{name.upper()}"
    for name in (
        "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
        "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s",
    )
}  # fmt: skip
FLOATS = {"F64", "F32", "F16", "BF16"}
OWN_TYPE = re.compile(r"(?P<mark>[-._])(?:(?:i?q\d|t?q\d)\w*|b?f16|f32)$", re.IGNORECASE)
PART = re.compile(r"-00001-of-\d{5}$")

TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\]")
FALLBACK = re.compile(r"(?:warning: )?(\S+) +- ncols +(\d+) not divisible by (\d+) \(required for type +(\w+)\)")
INSTEAD = re.compile(r"falling back to +(\w+)")
QUANT_SIZE = re.compile(r"quant size += +([\d.]+) MiB")
FAILED = re.compile(r"(?:failed to quantize|error loading model|error): (.+)")
LAST_LINES = 8


@frozen
class Fallback:
    """Tensors whose rows do not fit the type that was wanted."""

    wanted: str
    instead: str
    row: int
    block: int


@frozen
class Job:
    """`importance`: a file of llama-imatrix. `threads`: 0 for all cores."""

    source: Path
    type: str
    importance: Path | None = None
    requantize: bool = False
    threads: int = 0


@frozen
class Quantized:
    file: GgufFile
    fallbacks: Mapping[Fallback, int]


def quantize(
    source: Path,
    types: Sequence[str],
    folder: Path | None = None,
    *,
    importance: Path | None = None,
    requantize: bool = False,
    force: bool = False,
    threads: int = 0,
    converter: str | None = None,
) -> Iterator[Quantized]:
    """One after another. `folder`: where the files go, beside the source if None. Raises ModelError.

    Everything that can be known is checked before the first file is made.
    """
    if find_spec("llama_cpp") is None:
        raise UsageError(
            "llama.cpp quantises, and its binding is not installed: pip install '.[models]' in a checkout of xgen-proxy"
        )
    if not source.exists():
        raise UsageError(f"there is no {source}; `xgen-proxy models pull` fetches a model")
    if source.name in ("", ".."):  # as of `.`
        source = source.resolve()
    targets = [(type, target_of(source, type, folder or source.parent)) for type in types]
    if not force and (there := [str(target) for _, target in targets if target.exists()]):
        raise UsageError(f"{', '.join(there)} exists; pass --force to replace it, or --out for another folder")
    if any(target.exists() and target.samefile(source) for _, target in targets):
        raise UsageError(f"the result would replace its source {source}; choose another folder with --out")
    if importance is not None:
        read_importance(importance)
    command = find_converter(converter) if source.is_dir() else []
    if not source.is_dir():
        refuse_quantized(read_model(source), requantize)
    make_folder(folder or source.parent)
    with alone_in(folder or source.parent), scratch_beside(targets[0][1]) as scratch:
        if source.is_dir():
            convert(command, source, scratch / "converted.gguf")
            source = scratch / "converted.gguf"
        for type, target in targets:
            yield make(Job(source, type, importance, requantize, threads), scratch / target.name, target)


def target_of(source: Path, type: str, folder: Path) -> Path:
    """`model.f16.gguf` → `model.Q4_0.gguf`: the source's own type is replaced."""
    stem = PART.sub("", source.name.removesuffix(".gguf"))
    mark = found["mark"] if (found := OWN_TYPE.search(stem)) else "-"
    return folder / f"{OWN_TYPE.sub('', stem)}{mark}{type.upper()}.gguf"


def refuse_quantized(file: GgufFile, requantize: bool) -> None:
    """Raises ModelError if its weights are quantised already."""
    quantized = {type: count for type, count in file.types().items() if type not in FLOATS}
    if quantized and not requantize:
        kinds = ", ".join(f"{count} × {type}" for type, count in quantized.items())
        raise ModelError(
            f"{file.path} is quantised already ({kinds}), and quantising again loses more than quantising the original "
            "once; start from the f16 or bf16 file or the Hugging Face directory, or pass --allow-requantize"
        )


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def make(job: Job, made: Path, target: Path) -> Quantized:
    """Raises ModelError. `target` appears only when it is whole and llama.cpp has loaded it."""
    plan = run(job, made, dry_run=True)
    need_space(made.parent, plan.size, target.name)
    log = run(job, made, dry_run=False)
    source, result = read_model(job.source), read_gguf(made)
    if len(result.tensors) != len(source.tensors):
        raise ModelFileError(f"{target.name} has {len(result.tensors)} tensors, not {len(source.tensors)}; not kept")
    publish(made, target)
    return Quantized(read_gguf(target), log.fallbacks)


class Log:
    """What llama.cpp says while it works."""

    def __init__(self) -> None:
        self.fallbacks: Counter[Fallback] = Counter()
        self.size = 0  # of the result, in bytes
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.cause = ""
        self._pending: tuple[str, int, int] | None = None

    def read(self, line: str) -> int | None:
        """Returns the number of the tensor that llama.cpp has come to, if the line names one."""
        if line.strip():
            self.last.append(line.rstrip())
        if found := FALLBACK.search(line):
            self._pending = found[4], int(found[2]), int(found[3])
        if (found := INSTEAD.search(line)) and self._pending:
            wanted, row, block = self._pending
            self.fallbacks[Fallback(wanted.upper(), found[1].upper(), row, block)] += 1
            self._pending = None
        elif found := QUANT_SIZE.search(line):
            self.size = int(float(found[1]) * 2**20)
        elif found := FAILED.search(line):
            self.cause = found[1].strip()
        found = TENSOR.search(line)
        return int(found[1]) if found else None


def run(job: Job, made: Path, dry_run: bool) -> Log:
    """Let the worker do the job. A dry run tells the size. Raises ModelError."""
    count = len(read_model(job.source).tensors)
    log, progress = Log(), Progress(f"quantising to {job.type}", count, "tensors")
    with worker(job, made, dry_run) as process:
        for line in process.stdout or ():
            number = log.read(line)
            if number is not None and not dry_run:
                progress.update(number)
        status = process.wait()
    progress.end()
    if status != 0:
        raise failure(job, made, log, status)
    return log


@contextlib.contextmanager
def worker(job: Job, made: Path, dry_run: bool) -> Iterator[subprocess.Popen[str]]:
    """Killed when the block is left early, as by Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "xgen_proxy.models.quantize.worker"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        with contextlib.suppress(BrokenPipeError):
            send(cast(IO[str], process.stdin), job, made, dry_run)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def send(stdin: IO[str], job: Job, made: Path, dry_run: bool) -> None:
    with stdin:
        json.dump(
            {
                "source": str(job.source), "target": str(made), "ftype": FTYPES[job.type], "dry_run": dry_run,
                "threads": job.threads or len(os.sched_getaffinity(0)), "requantize": job.requantize,
                "importance": str(job.importance) if job.importance else None,
            },
            stdin,
        )  # fmt: skip


def failure(job: Job, made: Path, log: Log, status: int) -> ModelError:
    """llama.cpp says little of a full disk, so look."""
    if free_space(made.parent) < MARGIN:
        return ModelError(f"the disk of {made.parent.parent} is full; free some space and run the command again")
    if status < 0:
        return ModelError(f"llama.cpp was ended by signal {-status} while it made {job.type}: out of memory?")
    say("\n".join(f"  {line}" for line in log.last))
    return ModelError(
        f"llama.cpp could not make {job.type}: {log.cause or 'see its last words above'}; nothing was kept"
    )
