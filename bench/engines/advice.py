"""Flags of vLLM that a user should know, each with what was measured when it was changed alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from bench.engines.results import DIRECT, Level, Results, Run
from bench.engines.table import Row, runs_of

BASE = "base"


@dataclass(frozen=True)
class Advice:
    """`knob`: the variant that was measured. `level`: the load that shows what it does."""

    knob: str
    flag: str
    advice: str
    level: Level


SHARED = Level(64, shared_prefix=192)
ADVICE = (
    Advice(
        "batched-tokens-2048", "--max-num-batched-tokens 2048",
        "Set it, as Compose and Kubernetes do: answers begin earlier at the same throughput. A model that takes images "
        "may need more, which vLLM says when it starts.",
        Level(64),
    ),
    Advice(
        "max-num-seqs-64", "--max-num-seqs 64",
        "Leave it at 256, as Compose does: fewer cost throughput as soon as more requests come.", Level(256),
    ),
    Advice(
        "max-num-seqs-512", "--max-num-seqs 512",
        "No: at 512 at once, where alone it could help, answers begin earlier but end later, and there are fewer.",
        Level(512),
    ),
    Advice("eager", "--enforce-eager", "Never on a GPU: it turns CUDA graphs off.", Level(64)),
    Advice(
        "prefix-caching", "--enable-prefix-caching",
        "Leave it on, as vLLM does: chats and agents send the same beginning again. The base has it off.", SHARED,
    ),
    Advice(
        "kv-fp8", "--kv-cache-dtype fp8",
        "For room, not for speed: twice as many tokens fit into the cache. Measure your model's answers with it first.",
        Level(256),
    ),
    Advice(
        "memory-0.5", "--gpu-memory-utilization 0.5",
        "Leave it at 0.9 unless something else needs the GPU. With short requests, half of it does as well; what is "
        "left is room for long ones.",
        Level(256),
    ),
    Advice("no-chunked-prefill", "--no-enable-chunked-prefill", "No: it brings nothing.", Level(64)),
    Advice(
        "stream-interval-8", "--stream-interval 8",
        "No: tokens come in lots of eight, and nothing is won at this size.", Level(256),
    ),
    Advice("block-size-32", "--block-size 32", "Leave it to vLLM.", Level(256)),
)  # fmt: skip


def flags(results: Results) -> Iterator[Row]:
    """A row for each flag: the advice, and the variant beside the base at the load that shows it."""
    yield "flag", "advice", "load", "output tok/s", "base", "TTFT p50, ms", "base"
    for each in ADVICE:
        runs, base = (runs_of(results, name, DIRECT, each.level) for name in (each.knob, BASE))
        if runs and base:
            cells = (tokens(runs), tokens(base), first_token(runs), first_token(base))
            yield f"`{each.flag}`", each.advice, each.level.name, *cells


def tokens(runs: list[Run]) -> str:
    return f"{statistics.median(run.output_tok_s for run in runs):,.0f}"


def first_token(runs: list[Run]) -> str:
    return f"{statistics.median(run.ttft['p50'] for run in runs):,.0f}"
