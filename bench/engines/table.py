"""The tables of a comparison of engines, for documents and for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.engines.results import DIRECT, PROXY, TIMES, Level, Results, Run, spread

Row = tuple[str, ...]
# What the source document says that vLLM does.
SOURCE_RATIO, SOURCE_AT = 15, 32
SOURCE_64 = "a 7B at 64 at once on an A100: 245 tokens/s, P95 800 ms"


def loads(results: Results) -> list[Level]:
    """Closed before open, small before large."""
    return sorted(
        {run.level for run in results.runs},
        key=lambda level: (level.share or 0, level.streams or 0, level.shared_prefix),
    )


def names(results: Results) -> list[str]:
    return sorted({run.subject for run in results.runs}, key=list(results.subjects).index)


def runs_of(results: Results, subject: str, where: str, level: Level) -> list[Run]:
    key = (subject, where, level)
    return [run for run in results.runs if (run.subject, run.where, run.level) == key]


def overview(results: Results) -> Iterator[Row]:
    """Output tokens per second by engine and concurrency, direct where that can be had, and the memory that it took."""
    levels = [level for level in loads(results) if level.streams and not level.shared_prefix]
    yield "output tok/s", "weights", *(level.name for level in levels), "peak memory, MiB"
    for name in names(results):
        own = [run for run in results.runs if run.subject == name]
        where = shown(own)
        cells = [spread(run.output_tok_s for run in runs_of(results, name, where, level)) for level in levels]
        label = name if where == DIRECT else f"{name}, through the proxy"
        yield label, str(results.subjects[name]["weights"]), *cells, memory(own)


def shown(runs: list[Run]) -> str:
    """Direct runs, or those through the proxy of an engine that the load generator cannot reach."""
    return DIRECT if any(run.where == DIRECT for run in runs) else PROXY


def memory(runs: list[Run]) -> str:
    on_gpu = [run.gpu_mb for run in runs if run.gpu_mb]
    return f"{max(on_gpu):,.0f} on the GPU" if on_gpu else f"{max(run.rss_mb for run in runs):,.0f}"


def latencies(results: Results) -> Iterator[Row]:
    """Every load of every engine, direct and through the proxy."""
    yield (
        "engine", "load", "", "output tok/s", "TTFT p50 / p95 / p99, ms", "TPOT p50 / p95 / p99, ms",
        "E2E p50 / p95 / p99, ms", "goodput, req/s", "failed", "engine CPU s",
    )  # fmt: skip
    for name in names(results):
        for level in loads(results):
            for where in (DIRECT, PROXY):
                if runs := runs_of(results, name, where, level):
                    yield load_row(name, level, where, runs)


def load_row(name: str, level: Level, where: str, runs: list[Run]) -> Row:
    times = [" / ".join(middle(runs, time, each) for each in ("p50", "p95", "p99")) for time in TIMES]
    rates = sorted({run.rate for run in runs if run.rate})
    load = f"{level.name} ({rates[0]:.2g}/s)" if rates else level.name
    failed = f"{sum(run.failed for run in runs)} of {sum(run.requests for run in runs)}"
    goodput = spread((run.goodput for run in runs), 2)
    tokens = spread(run.output_tok_s for run in runs)
    return name, load, where, tokens, *times, goodput, failed, spread((run.cpu_s for run in runs), 1)


def middle(runs: list[Run], time: str, percentile: str) -> str:
    return f"{statistics.median(getattr(run, time)[percentile] for run in runs):,.0f}"


def ratios(results: Results) -> Iterator[Row]:
    """Through the proxy against direct, the two runs of one repeat."""
    yield "engine", "load", "output tok/s", "TTFT p50", "E2E p50", "proxy CPU s per 1,000 requests"
    for name in names(results):
        for level in loads(results):
            direct = {run.repeat: run for run in runs_of(results, name, DIRECT, level)}
            pairs = [(direct[run.repeat], run) for run in runs_of(results, name, PROXY, level) if run.repeat in direct]
            if pairs and all(run.completed for pair in pairs for run in pair):
                yield ratio_row(name, level, pairs)


def ratio_row(name: str, level: Level, pairs: list[tuple[Run, Run]]) -> Row:
    tokens = spread((run.output_tok_s / direct.output_tok_s for direct, run in pairs), 3)
    first = spread((run.ttft["p50"] / direct.ttft["p50"] for direct, run in pairs), 3)
    whole = spread((run.e2el["p50"] / direct.e2el["p50"] for direct, run in pairs), 3)
    cpu = spread(((run.proxy_cpu_s or 0) / run.completed * 1000 for _, run in pairs), 2)
    return name, level.name, tokens, first, whole, cpu


def knobs(results: Results) -> Iterator[Row]:
    """One flag changed at a time, beside the base."""
    levels = loads(results)
    yield "variant", "flags", "start, s", *(f"{level.name}: tok/s; TTFT, E2E p50 ms" for level in levels), "GPU MiB"
    for name in names(results):
        cells = [knob_cell(results, name, level) for level in levels]
        own = [run for run in results.runs if run.subject == name]
        starts = spread(results.starts_s.get(name, []))
        yield name, str(results.subjects[name]["knob"] or "–"), starts, *cells, memory(own)


def knob_cell(results: Results, name: str, level: Level) -> str:
    runs = [run for run in results.runs if run.subject == name and run.level == level]
    direct = [run for run in runs if run.where == DIRECT] or runs
    if not direct:
        return "–"
    tokens = spread(run.output_tok_s for run in direct)
    return f"{tokens}; {middle(direct, 'ttft', 'p50')}, {middle(direct, 'e2el', 'p50')}"


def claims(results: Results) -> Iterator[Row]:
    """The source document's claims beside what was measured."""
    yield "the source says of vLLM", "measured here"
    mine, plain = (
        [run.output_tok_s for run in runs_of(results, name, DIRECT, Level(SOURCE_AT))]
        for name in ("vllm", "transformers")
    )
    # One request at a time: its throughput does not depend on how many wait.
    plain = plain or [run.output_tok_s for run in results.runs if run.subject == "transformers"]
    measured = f"{statistics.median(mine) / statistics.median(plain):,.0f} ×" if mine and plain else "–"
    yield f"{SOURCE_RATIO} × Transformers at {SOURCE_AT} at once", measured
    at_64 = runs_of(results, "vllm", DIRECT, Level(64))
    found = spread(run.output_tok_s for run in at_64)
    yield SOURCE_64, f"{found} tokens/s, E2E P95 {middle(at_64, 'e2el', 'p95')} ms" if at_64 else "–"


def conditions(results: Results) -> Iterator[Row]:
    """Where the figures come from."""
    of, load = results.conditions, results.load
    yield "conditions", ""
    yield "command", f"`{of['command']}`"
    yield "date", str(of["date"])
    machine = of["machine"]
    gpus = "".join(f", {gpu}" for gpu in machine["gpus"])
    yield "machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB{gpus}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    yield "load", f"{load['input_len']} tokens in, {load['output_len']} out, repeats: {load['repeats']}"
    yield "goodput", f"first token within {load['slo_ttft']:g} ms, each further one within {load['slo_tpot']:g} ms"


def warnings(results: Results) -> list[str]:
    """Reasons to doubt the comparison."""
    found = []
    for run in results.runs:
        at = f"{run.subject}, {run.where}, {run.level.name}, repeat {run.repeat + 1}"
        if run.failed:
            found.append(f"{at}: {run.failed} of {run.requests} requests failed")
        if run.short:
            found.append(f"{at}: {run.short} tokens counted less than requested")
    return found + [f"{each['subject']}, {each['where']}, {each['level']}: {each['why']}" for each in results.skipped]


def text(rows: Iterator[Row]) -> str:
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)
