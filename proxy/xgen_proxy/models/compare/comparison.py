"""Runs the comparison: what is asked of which process, in which order. Gives the content of the result file.

The base's logits of one window are written to a temporary file, and each model compares its own with them: exact, and
never more than one window on the disk (512 tokens of a vocabulary of 49,152: 50 MB). Storing the base's likeliest
tokens instead would be smaller, and lose the tail of which the 99.9 % divergence is made.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from xgen_proxy.gguf.header import GgufFile
from xgen_proxy.models.compare import passages
from xgen_proxy.models.compare.figures import Tokens, equal_answers, spread, summary
from xgen_proxy.models.compare.plan import Plan, names, need_memory
from xgen_proxy.models.compare.processes import Worker
from xgen_proxy.models.errors import ModelError
from xgen_proxy.models.files.gguf_file import read_model
from xgen_proxy.models.inspection.machine import ram
from xgen_proxy.models.progress import Progress
from xgen_proxy.models.storage import need_space

ANSWER_TOKENS = 32
ANSWER_CONTEXT = 256  # tokens at least, for a prompt in its chat template and the answer
# For the time that is left: what else takes as long as how many tokens of a text.
GENERATED_WEIGHT = 3
LOAD_WEIGHT = 60

Windows = dict[str, list[list[int]]]


def compare(plan: Plan) -> dict[str, Any]:
    """Raises ModelError."""
    files = [read_model(path) for path in plan.models]
    shown = dict(zip(plan.models, names(plan.models), strict=True))
    need_memory(files, ram().available)
    own = passages.texts(plan.text)
    with tempfile.TemporaryDirectory(prefix="xgen-compare-") as folder, contextlib.ExitStack() as stack:
        run = Run(plan, shown, Path(folder), stack)
        try:
            run.start()
            windows = run.tokenize(own)
            read, raced, answered = run.read(windows), run.race(windows), run.answer()
            stack.close()
            loaded = run.load(windows)
        finally:
            run.progress.end()
    found = {path: {**loaded[path], **raced[path], "texts": read[path], **answered[path]} for path in plan.models}
    return {
        "base": shown[plan.base],
        "settings": settings(plan),
        "texts": {name: len(parts) for name, parts in windows.items()},
        "models": [
            {"name": shown[file.path], **described(file), **found[file.path]}
            for file in sorted(files, key=lambda file: -file.size)
        ],
    }


def settings(plan: Plan) -> dict[str, Any]:
    """What a result depends on, beside the models. `texts` has the windows of each."""
    return {
        "context": plan.context,
        "repeat": plan.repeat,
        "threads": plan.threads,
        "prompt_tokens": plan.prompt_tokens,
        "generated_tokens": plan.generated_tokens,
        "answer_tokens": ANSWER_TOKENS,
        "page_cache": "warm",
    }


def described(file: GgufFile) -> dict[str, Any]:
    return {
        "file": file.path.name,
        "size_bytes": file.size,
        "bits_per_weight": round(file.bits_per_weight, 2),
        "tensor_types": dict(file.types().most_common()),
    }


class Run:
    """The steps of one comparison, in the order of its methods. `stack` ends the processes."""

    def __init__(self, plan: Plan, shown: dict[Path, str], folder: Path, stack: contextlib.ExitStack) -> None:
        self.plan, self.shown, self.folder, self.stack = plan, shown, folder, stack
        self.order = [plan.base, *(path for path in plan.models if path != plan.base)]
        self.workers: dict[Path, Worker] = {}
        self.progress = Progress("compare", None, "steps")
        self._done = 0

    def _step(self, weight: int, path: Path, doing: str) -> None:
        """To be called before the step, so that the bar says what is running."""
        self.progress.update(self._done, f"{self.shown[path]}: {doing}")
        self._done += weight

    def start(self) -> None:
        """Load all models. Raises ModelError if their vocabularies differ: then no figure could be compared."""
        fingerprints = {}
        for path in self.order:
            worker = self.stack.enter_context(Worker(path, self.folder / f"{len(self.workers)}.log"))
            self.workers[path] = worker
            self._step(0, path, "loading")
            self._load(worker)
            fingerprints[path] = worker.ask("vocabulary")
            if fingerprints[path] != fingerprints[self.plan.base]:
                raise ModelError(
                    f"{path} has another vocabulary than the base {self.plan.base}: neither perplexity nor divergence "
                    "can be compared; choose a --base of the same model"
                )

    def _load(self, worker: Worker, mmap: bool = True) -> dict[str, Any]:
        context = max(self.plan.context, ANSWER_CONTEXT)
        loaded: dict[str, Any] = worker.ask(
            "load", path=str(worker.model), context=context, threads=self.plan.threads, mmap=mmap
        )
        return loaded

    def tokenize(self, own: dict[str, str]) -> Windows:
        """Cut the texts into windows, and tell the progress bar of all the work to come."""
        plan = self.plan
        windows = {}
        for name, text in own.items():
            tokens = self.workers[plan.base].ask("tokenize", text=text)
            for path, worker in self.workers.items():
                if worker.ask("tokenize", text=text) != tokens:
                    raise ModelError(f"{path} cuts the text {name} into other tokens than the base {plan.base} does")
            windows[name] = passages.windows(name, tokens, plan.context, plan.windows)
        read = sum(len(parts) for parts in windows.values()) * plan.context
        race = (plan.repeat + 1) * (plan.prompt_tokens + GENERATED_WEIGHT * plan.generated_tokens)
        answers = plan.answers * ANSWER_TOKENS * GENERATED_WEIGHT
        self.progress.total = len(plan.models) * (read + race + answers + 2 * plan.repeat * LOAD_WEIGHT)
        return windows

    def read(self, windows: Windows) -> dict[Path, dict[str, Any]]:
        """Window by window: first the base, then each model against it."""
        logits = self.folder / "logits.npy"
        found: dict[Path, dict[str, Tokens]] = {path: {} for path in self.order}
        for name, parts in windows.items():
            for path in self.order:
                found[path][name] = Tokens([], [], [])
            for number, tokens in enumerate(parts, 1):
                self._write(tokens, logits)
                for path, worker in self.workers.items():
                    self._step(len(tokens), path, f"{name}, window {number} of {len(parts)}")
                    found[path][name].extend(Tokens(**worker.ask("window", tokens=tokens, file=str(logits))))
        return {
            path: {name: summary(tokens) for name, tokens in {**by_text, "all": merged(by_text)}.items()}
            for path, by_text in found.items()
        }

    def _write(self, tokens: list[int], logits: Path) -> None:
        base = self.workers[self.plan.base]
        vocabulary = base.ask("vocabulary_size")
        need_space(self.folder, len(tokens) // 2 * vocabulary * 4, "a window of logits")
        base.ask("write_window", tokens=tokens, file=str(logits))

    def race(self, windows: Windows) -> dict[Path, dict[str, Any]]:
        """The speed, in turns, so that what else the machine does meets all models alike. The first round warms up."""
        sample = next(iter(windows.values()))[0][: self.plan.prompt_tokens]
        weight = len(sample) + GENERATED_WEIGHT * self.plan.generated_tokens
        rounds: dict[Path, list[dict[str, float]]] = {path: [] for path in self.order}
        for number in range(self.plan.repeat + 1):
            for path, worker in self.workers.items():
                self._step(weight, path, f"speed, round {number} of {self.plan.repeat}")
                rounds[path].append(worker.ask("speed", tokens=sample, count=self.plan.generated_tokens))
        return {
            path: {
                "prompt_tokens_per_s": spread([each["prompt"] for each in taken[1:]]),
                "generated_tokens_per_s": spread([each["generation"] for each in taken[1:]]),
            }
            for path, taken in rounds.items()
        }

    def answer(self) -> dict[Path, dict[str, Any]]:
        """The same greedy answers as the base gives, in all and by language."""
        asked = passages.prompts(self.plan.answers)
        given: dict[Path, list[list[int]]] = {path: [] for path in self.order}
        for number, prompt in enumerate(asked, 1):
            for path, worker in self.workers.items():
                self._step(ANSWER_TOKENS * GENERATED_WEIGHT, path, f"answer {number} of {len(asked)}")
                given[path].append(worker.ask("answer", prompt=prompt.text, count=ANSWER_TOKENS))

        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(asked):
            places.setdefault(prompt.language, []).append(place)
            places.setdefault("all", []).append(place)

        def equal(path: Path, chosen: list[int]) -> dict[str, Any]:
            ours, theirs = ([given[each][place] for place in chosen] for each in (path, self.plan.base))
            return equal_answers(theirs, ours)

        return {
            path: {"answers": {name: equal(path, chosen) for name, chosen in places.items()}} for path in self.order
        }

    def load(self, windows: Windows) -> dict[Path, dict[str, Any]]:
        """Time and memory of a process that loads the model and reads and writes a few tokens, in turns."""
        sample = next(iter(windows.values()))[0][: self.plan.prompt_tokens]
        rounds: dict[tuple[Path, bool], list[dict[str, Any]]] = {}
        for number in range(1, self.plan.repeat + 1):
            for path in self.order:
                for mmap in (True, False):
                    self._step(LOAD_WEIGHT, path, f"load and memory, round {number} of {self.plan.repeat}")
                    with Worker(path, self.folder / "load.log") as worker:
                        loaded = self._load(worker, mmap)
                        worker.ask("speed", tokens=sample, count=1)
                        rounds.setdefault((path, mmap), []).append({**loaded, "bytes": worker.ask("memory")})
        return {
            path: {
                f"{figure}_{'mmap' if mmap else 'no_mmap'}": spread([each[key] for each in rounds[path, mmap]])
                for mmap in (True, False)
                for figure, key in (("load_s", "load_s"), ("rss_bytes", "bytes"), ("rss_empty_bytes", "empty_bytes"))
            }
            for path in self.order
        }


def merged(by_text: dict[str, Tokens]) -> Tokens:
    found = Tokens([], [], [])
    for tokens in by_text.values():
        found.extend(tokens)
    return found
