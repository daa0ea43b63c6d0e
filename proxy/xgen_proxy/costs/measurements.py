"""Measurements, in the formats that users have: vLLM's load generator, our bench of engines, and figures typed by hand.

- `vllm bench serve --save-result`: one JSON object for a run; with --append-result one in each line.
  https://docs.vllm.ai/en/latest/cli/bench/serve.html
- `bench.engines`: an object with a list of records: subject, where, the load, and what came of it.
- TOML or JSON with a table for each machine: {gpu: {requests_per_s, output_tokens_per_s, input_tokens_per_s}}.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from xgen_proxy.costs.errors import CostError
from xgen_proxy.values import frozen

HOW_TO_MEASURE = (
    "measure with `vllm bench serve --goodput ttft:500 tpot:50 --save-result` and your own limits in ms, "
    "or pass --any-latency to count every completed request"
)
PROXY, DIRECT = "proxy", "direct"
PLACES = {PROXY: "through the proxy", DIRECT: "without the proxy"}
BY_HAND = ("requests_per_s", "output_tokens_per_s", "input_tokens_per_s")


@frozen
class Source:
    """`machine`: the name in the table of prices; None where the file has a table for each machine. `subject`: which
    of a file's subjects counts; None for all."""

    path: Path
    machine: str | None = None
    subject: str | None = None


@frozen
class Repeat:
    """One run. `goodput`: requests/s within the objectives. `throughput`: all requests/s that were completed. Tokens
    are per request; None where the file does not tell."""

    goodput: float
    throughput: float
    tokens_in: float | None
    tokens_out: float | None
    failed: int


@frozen
class Run:
    """One load on one subject. `where`: PROXY or DIRECT; None where the file does not tell. `rate`: requests/s that
    were sent, where they came at a rate (inf: all at once). `concurrency`: how many were in flight at most."""

    machine: str
    subject: str
    where: str | None
    rate: float
    concurrency: int | None
    repeats: tuple[Repeat, ...]

    @property
    def height(self) -> tuple[float, int]:
        """Runs of one subject in the order of their load."""
        return self.rate, self.concurrency or 0

    @property
    def is_open(self) -> bool:
        """Requests arrived at a rate, whether or not earlier ones had been answered. In a closed loop each waits until
        another is answered, so that no queue grows."""
        return math.isfinite(self.rate)

    @property
    def load(self) -> str:
        parts = [f"{self.rate:g}/s"] if self.is_open else []
        return ", ".join([*parts, *([] if self.concurrency is None else [f"{self.concurrency} at once"])])


@frozen
class Measurements:
    """`conditions`: of each file that tells any. `skipped`: records without goodput."""

    runs: tuple[Run, ...]
    conditions: tuple[dict[str, Any], ...]
    skipped: int


def parse_source(text: str) -> Source:
    """`MACHINE=FILE`, `MACHINE=FILE:SUBJECT` or `FILE`."""
    machine, separator, rest = text.partition("=")
    if not separator:
        return Source(Path(text))
    if not Path(rest).exists() and ":" in rest:
        file, _, subject = rest.rpartition(":")
        return Source(Path(file), machine, subject)
    return Source(Path(rest), machine)


def read_measurements(sources: Iterable[Source], any_latency: bool) -> Measurements:
    """Runs of the same load are repeats of one run. `any_latency`: a request counts however late it was. Raises
    CostError."""
    loads: dict[tuple[str, str, str | None, float, int | None], list[Repeat]] = {}
    conditions: list[dict[str, Any]] = []
    skipped = 0
    for source in sources:
        content = read(source.path)
        conditions += told_conditions(source.path, content)
        used = unusable = 0
        for machine, subject, figures in records(source, content):
            repeat = repeat_of(source.path, figures, any_latency)
            if repeat is None:
                unusable += 1
                continue
            used += 1
            concurrency = number(source.path, figures, "max_concurrency")
            load = rate_of(source.path, figures), None if concurrency is None else int(concurrency)
            loads.setdefault((machine, subject, where_of(figures), *load), []).append(repeat)
        if not used:
            raise CostError(
                f"{source.path} has no goodput: {HOW_TO_MEASURE}" if unusable else nothing_in(source, content)
            )
        skipped += unusable
    runs = (Run(*load, repeats=tuple(repeats)) for load, repeats in loads.items())
    return Measurements(tuple(runs), tuple(conditions), skipped)


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of the file. Raises CostError."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            return [tomllib.loads(text)]
        content = parse_json(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise CostError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    objects = content if isinstance(content, list) else [content]
    if not objects or not all(isinstance(each, dict) for each in objects):
        raise CostError(f"{path} has no measurement; see `xgen-proxy cost --help` for the formats")
    return objects


def parse_json(text: str) -> Any:
    """One value, or one in each line. Raises json.JSONDecodeError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        return [json.loads(line) for line in lines]


def told_conditions(path: Path, content: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The conditions in our own result files; of vLLM's, the date and the model."""
    for each in content:
        if isinstance(each.get("conditions"), dict):
            yield {"file": path.name, **each["conditions"]}
        elif "model_id" in each:
            yield {"file": path.name, "date": each.get("date"), "model": each["model_id"]}


def records(source: Source, content: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(machine, subject, figures in the words of vLLM's load generator). Raises CostError."""
    for each in content:
        found = list(bench_records(each))
        if not found and "request_throughput" in each:
            found = [(str(each.get("label") or model_name(each)), each)]
        if found and source.machine is None:
            raise CostError(
                f"{source.path} does not say on which machine it was measured; write MACHINE={source.path}, "
                "with a machine of your table of prices"
            )
        if found:
            yield from ((source.machine or "", *record) for record in found if matches(source.subject, record[0]))
        else:
            yield from by_hand(source, each)


def bench_records(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of our bench: each record in whatever list of the file has records with a subject."""
    for value in content.values():
        for record in value if isinstance(value, list) else ():
            if isinstance(record, dict) and isinstance(record.get("subject"), str):
                yield bench_subject(record), bench_figures(record)


def bench_subject(record: dict[str, Any]) -> str:
    """The engine; and what is measured apart from it: through the proxy, and with prompts that begin alike."""
    where, shared = record.get("where"), level_of(record).get("shared_prefix")
    parts = [record["subject"], where if where != DIRECT else None, f"{shared} tokens shared" if shared else None]
    return ", ".join(filter(None, parts))


def bench_figures(record: dict[str, Any]) -> dict[str, Any]:
    """In the words of vLLM's load generator, which `figures` has where a record has it."""
    rate, seconds = record.get("output_tok_s"), record.get("seconds")
    return {
        "where": record.get("where"),
        "max_concurrency": record.get("concurrency", level_of(record).get("streams")),
        "request_rate": record.get("request_rate", record.get("rate")),
        "request_throughput": record.get("req_s"),
        "request_goodput": record.get("goodput"),
        "output_throughput": rate,
        "total_input_tokens": record.get("prompt_tokens"),
        "total_output_tokens": rate * seconds if rate and seconds else None,
        **{key: record.get(key) for key in ("completed", "failed")},
        **(record.get("figures") or {}),
    }


def level_of(record: dict[str, Any]) -> dict[str, Any]:
    level = record.get("level")
    return level if isinstance(level, dict) else {}


def by_hand(source: Source, content: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A table for each machine, or the figures of the machine that the user named. Raises CostError."""
    tables = content if source.machine is None else {source.machine: content.get(source.machine, content)}
    for machine, table in tables.items():
        if isinstance(table, dict) and "requests_per_s" in table:
            if unknown := set(table) - {*BY_HAND, "subject"}:
                raise CostError(
                    f"{source.path}: {machine} has the unknown key {min(unknown)}; known are {', '.join(BY_HAND)}"
                )
            requests, tokens_out, tokens_in = (number(source.path, table, key) for key in BY_HAND)
            figures = {
                "request_throughput": requests,
                "request_goodput": requests,
                "output_throughput": tokens_out,
                "total_token_throughput": None if tokens_in is None or tokens_out is None else tokens_in + tokens_out,
            }
            yield machine, str(table.get("subject", "")), figures


def matches(wanted: str | None, subject: str) -> bool:
    return wanted is None or subject in (wanted, wanted.replace("/", ", "))


def model_name(result: dict[str, Any]) -> str:
    return str(result.get("model_id") or "").rstrip("/").rpartition("/")[2]


def where_of(figures: dict[str, Any]) -> str | None:
    where = figures.get("where")
    return where if where in PLACES else None


def rate_of(path: Path, figures: dict[str, Any]) -> float:
    """vLLM writes "inf" for requests that are all sent at once. Raises CostError."""
    if figures.get("request_rate") in ("inf", math.inf):
        return math.inf
    rate = number(path, figures, "request_rate")
    return math.inf if rate is None else rate


def repeat_of(path: Path, figures: dict[str, Any], any_latency: bool) -> Repeat | None:
    """None without goodput. Raises CostError."""
    throughput = number(path, figures, "request_throughput")
    goodput = throughput if any_latency else number(path, figures, "request_goodput")
    if throughput is None or goodput is None:
        return None
    completed = number(path, figures, "completed")
    tokens: list[float | None] = []
    for total, rate in (
        (number(path, figures, "total_input_tokens"), input_rate(path, figures)),
        (number(path, figures, "total_output_tokens"), number(path, figures, "output_throughput")),
    ):
        if total is not None and completed:
            tokens.append(total / completed)
        else:
            tokens.append(rate / throughput if rate is not None and throughput else None)
    failed = int(number(path, figures, "failed") or 0)
    return Repeat(goodput=goodput, throughput=throughput, tokens_in=tokens[0], tokens_out=tokens[1], failed=failed)


def input_rate(path: Path, figures: dict[str, Any]) -> float | None:
    both, output = (number(path, figures, key) for key in ("total_token_throughput", "output_throughput"))
    return None if both is None or output is None else both - output


def number(path: Path, figures: dict[str, Any], key: str) -> float | None:
    """Raises CostError for what is no number, 0 or more."""
    value = figures.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise CostError(f"{path}: {key} is {value!r}; it must be a number, 0 or more")
    return float(value)


def nothing_in(source: Source, content: list[dict[str, Any]]) -> str:
    subjects = {subject for each in content for subject, _ in bench_records(each)}
    if source.subject and subjects:
        return f"{source.path} has no subject {source.subject}, only {', '.join(sorted(subjects))}"
    return f"{source.path} has no measurement; see `xgen-proxy cost --help` for the formats"
