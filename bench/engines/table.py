"""The tables of a comparison of engines, for documents and for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from bench.engines.results import DIRECT, NOT_STARTED, PROXY, TIMES, Level, Results, Run, same_rate, spread
from bench.provenance import earlier

Row = tuple[str, ...]
# The requests from which a percentile is more than the slowest of them.
FEWEST = {"p50": 1, "p95": 20, "p99": 100}
# What the document that the project began with says of vLLM.
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
    """Of an open load those at its newest rate: another rate is another load."""
    own = [run for run in results.runs if (run.subject, run.level) == (subject, level)]
    return [run for run in own if run.where == where and same_rate(run.rate, own[-1].rate)]


def overview(results: Results) -> Iterator[Row]:
    """Output tokens per second by engine and concurrency, direct where that can be had, and the memory that it took."""
    levels = [level for level in loads(results) if level.plain]
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
    any_short = any(run.short for run in results.runs)
    yield (
        "engine", "load", "", "requests per run", "output tok/s", "TTFT p50 / p95 / p99, ms",
        "TPOT p50 / p95 / p99, ms", "E2E p50 / p95 / p99, ms", "goodput, req/s", "failed",
        *(["tokens short"] if any_short else []), "engine CPU s",
    )  # fmt: skip
    for name in names(results):
        for level in loads(results):
            for where in (DIRECT, PROXY):
                if runs := runs_of(results, name, where, level):
                    yield load_row(name, level, where, runs, any_short)


def load_row(name: str, level: Level, where: str, runs: list[Run], with_short: bool = False) -> Row:
    times = [" / ".join(middle(runs, time, each) for each in FEWEST) for time in TIMES]
    rate = runs[-1].rate
    load = f"{level.name} ({rate:.3g}/s)" if rate else level.name
    failed = f"{sum(run.failed for run in runs)} of {sum(run.requests for run in runs)}"
    goodput = spread((run.goodput for run in runs), 2)
    tokens = spread(run.output_tok_s for run in runs)
    short = [str(sum(run.short for run in runs))] if with_short else []
    return (
        name,
        load,
        where,
        sizes(runs),
        tokens,
        *times,
        goodput,
        failed,
        *short,
        spread((run.cpu_s for run in runs), 1),
    )


def sizes(runs: list[Run]) -> str:
    """The requests of a run, from the fewest to the most."""
    fewest, most = min(run.requests for run in runs), max(run.requests for run in runs)
    return f"{fewest:,}" if fewest == most else f"{fewest:,}–{most:,}"


def middle(runs: list[Run], time: str, percentile: str) -> str:
    """The median over the runs, if each has enough answers for the percentile."""
    if min(run.completed for run in runs) < FEWEST[percentile]:
        return "–"
    return f"{statistics.median(getattr(run, time)[percentile] for run in runs):,.0f}"


def ratios(results: Results) -> Iterator[Row]:
    """Through the proxy against direct, the two runs of one repeat, where they had the same load."""
    yield "engine", "load", "pairs alike", "output tok/s", "TTFT p50", "E2E p50", "proxy CPU s per 1,000 requests"
    for name in names(results):
        for level in loads(results):
            direct = {run.repeat: run for run in runs_of(results, name, DIRECT, level)}
            pairs = [(direct[run.repeat], run) for run in runs_of(results, name, PROXY, level) if run.repeat in direct]
            if pairs:
                yield ratio_row(name, level, pairs)


def alike(direct: Run, proxied: Run) -> bool:
    """Whether two runs of a repeat had the same load. Tokens that are missing, or counted twice, change all figures."""
    same = direct.requests == proxied.requests and same_rate(direct.rate, proxied.rate)
    return same and not any(run.short or not run.completed for run in (direct, proxied))


def ratio_row(name: str, level: Level, all_pairs: list[tuple[Run, Run]]) -> Row:
    pairs = [pair for pair in all_pairs if alike(*pair)]
    counted = f"{len(pairs)} of {len(all_pairs)}"
    tokens = spread((run.output_tok_s / direct.output_tok_s for direct, run in pairs), 3)
    first = spread((run.ttft["p50"] / direct.ttft["p50"] for direct, run in pairs), 3)
    whole = spread((run.e2el["p50"] / direct.e2el["p50"] for direct, run in pairs), 3)
    cpu = spread(((run.proxy_cpu_s or 0) / run.completed * 1000 for _, run in pairs), 2)
    return name, level.name, counted, tokens, first, whole, cpu


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
    runs = runs_of(results, name, DIRECT, level) or runs_of(results, name, PROXY, level)
    if not runs:
        return "–"
    tokens = spread(run.output_tok_s for run in runs)
    return f"{tokens}; {middle(runs, 'ttft', 'p50')}, {middle(runs, 'e2el', 'p50')}"


def claims(results: Results) -> Iterator[Row]:
    """The claims of the document that the project began with, beside what was measured."""
    yield "claim", "measured here"
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
    """Where the figures come from: the last call, and those before it."""
    of, load = results.conditions, results.load
    yield "conditions", ""
    yield from call_rows(of)
    for call in reversed(earlier(of)):
        known = "" if "date" in call else ", without a record of date and machine"
        yield from call_rows(call, "earlier ", known)
    yield "load", f"{load['input_len']} tokens in, {load['output_len']} out, repeats: {load['repeats']}"
    yield "goodput", f"first token within {load['slo_ttft']:g} ms, each further one within {load['slo_tpot']:g} ms"
    if results.skipped:
        yield "left out", "; ".join(dict.fromkeys(left_out(each) for each in results.skipped))


def call_rows(call: dict[str, Any], prefix: str = "", note: str = "") -> Iterator[Row]:
    yield f"{prefix}command{note}", f"`{call['command']}`"
    if "date" not in call:
        return
    yield f"{prefix}date", str(call["date"])
    machine = call["machine"]
    gpus = "".join(f", {gpu}" for gpu in machine["gpus"])
    size = f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    yield f"{prefix}machine", f"{machine['cpu']}, {size}{gpus}"
    yield f"{prefix}versions", ", ".join(f"{name} {version}" for name, version in call["versions"].items())


def left_out(skipped: dict[str, Any]) -> str:
    """Without the log of an engine that did not start."""
    if (skipped["where"], skipped["level"]) == NOT_STARTED:
        return f"{skipped['subject']}, which did not start"
    return f"{skipped['subject']}, {skipped['where']}, {skipped['level']}"


def warnings(results: Results) -> list[str]:
    """Reasons to doubt the comparison."""
    found = []
    for run in results.runs:
        at = f"{run.subject}, {run.where}, {run.level.name}, repeat {run.repeat + 1}"
        if run.failed:
            found.append(f"{at}: {run.failed} of {run.requests} requests failed")
        if run.short:
            found.append(f"{at}: {abs(run.short)} tokens counted {'less' if run.short > 0 else 'more'} than requested")
    skipped = [f"{each['subject']}, {each['where']}, {each['level']}: {each['why']}" for each in results.skipped]
    return found + list(dict.fromkeys(skipped))  # a load that no repeat had time for is told once


def text(rows: Iterator[Row]) -> str:
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)
