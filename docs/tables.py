"""Write the tables of these pages that repeat the code or a result file. test_docs.py fails while one is stale.

python docs/tables.py

To show a measurement: the command that measures writes its result file to bench/results/. Add the file and its rows to
RESULTS under a name, and put the markers of a table of that name into the page. The line that says when, where and by
which command it was measured comes with the table.
"""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "proxy" / "xgen_proxy"
RESULT_FILES = DOCS.parent / "bench" / "results"
CLIENTS = DOCS.parent / "tests" / "e2e" / "clients" / "results.json"
sys.path.insert(0, str(DOCS.parent))

from bench import images as images_bench  # noqa: E402
from bench import memory_guard as guard_bench  # noqa: E402
from bench.engines import advice  # noqa: E402
from bench.engines import results as engine_results  # noqa: E402
from bench.engines import table as engine_tables  # noqa: E402
from bench.provenance import provenance  # noqa: E402
from xgen_proxy.config.aliases import Alias, Models  # noqa: E402
from xgen_proxy.config.fallback import Fallback  # noqa: E402
from xgen_proxy.config.loading import env_name  # noqa: E402
from xgen_proxy.config.memory_guard import MemoryGuard  # noqa: E402
from xgen_proxy.config.settings import BackendSettings, Routing, Settings  # noqa: E402
from xgen_proxy.costs.measurements import PLACES  # noqa: E402
from xgen_proxy.dialects.dialect import Dialect  # noqa: E402
from xgen_proxy.dialects.registry import DIALECTS  # noqa: E402
from xgen_proxy.dialects.request_rules import Rule  # noqa: E402
from xgen_proxy.fleet.admission import Admission  # noqa: E402
from xgen_proxy.fleet.backend import Fleet  # noqa: E402
from xgen_proxy.models.compare.report import cost_rows, quality_rows, summary_rows  # noqa: E402
from xgen_proxy.observability.fleet_metrics import FleetMetrics  # noqa: E402
from xgen_proxy.observability.metrics import Metrics  # noqa: E402
from xgen_proxy.request.features import NEEDS  # noqa: E402
from xgen_proxy.request.limits import Limits  # noqa: E402
from xgen_proxy.request.presets import BY_TASK, PRESETS  # noqa: E402

# The packages in the order in which a request meets them.
ORDER = (
    "downstream",
    "api",
    "request",
    "routing",
    "fleet",
    "forwarding",
    "dialects",
    "translation",
    "upstream",
    "observability",
    "config",
    "gguf",
    "models",
    "costs",
    "launch",
)
Row = tuple[str, ...]
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(rows: Iterator[Row]) -> str:
    """The first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" * lines[0].count(" | ") + "|---|")
    return "\n".join(lines) + "\n"


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[Row]:
    yield "setting", "environment", "default", "what it is, and why"
    for name, field in model.model_fields.items():
        if not isinstance(field.default, BaseModel):
            setting = prefix + name
            yield f"`{setting}`", f"`{env_name(setting)}`", default(field), meaning(field)


def alias_parts() -> Iterator[Row]:
    yield "part", "what it is"
    for name, field in Alias.model_fields.items():
        yield f"`{name}`", meaning(field)


def meaning(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return " ".join([field.description or "", *([f"One of {shown(choices)}."] if choices else [])])


def default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value: Any = field.get_default(call_default_factory=True)
    return "" if value in (None, PydanticUndefined, {}, []) else f"`{value}`"


def metrics() -> Iterator[Row]:
    yield "metric", "type", "labels", "meaning"
    fleet = Fleet(Settings(backends={"llama_cpp": {"urls": ["http://127.0.0.1:1"], "dialect": "llama-server"}}))
    admission = Admission(0, 0)
    for family in FleetMetrics(fleet, admission).collect():
        labels: tuple[str, ...] = family._labelnames  # type: ignore[attr-defined]  # both kinds of family have it
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield f"`{name}`", family.type, ", ".join(labels), family.documentation
    for series in Metrics(fleet, admission).all():
        family = series.to_metric_family()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield f"`{name}`", family.type, ", ".join(series.labels), family.documentation


def rules() -> Iterator[Row]:
    yield "what", "engines", "done", "otherwise"
    engines: dict[Rule, list[str]] = {}
    for dialect in DIALECTS.values():
        own = [rule for rule in dialect.opaque_rules if rule not in Dialect.opaque_rules]
        for rule in (*dialect.rules, *own):
            engines.setdefault(rule, []).append(dialect.name)
    for rule, names in engines.items():
        yield rule.name, "all" if len(names) == len(DIALECTS) else ", ".join(names), rule.action, rule.hazard


def abilities() -> Iterator[Row]:
    yield "can it do", *DIALECTS
    for need in sorted(NEEDS):
        yield f"`{need}`", *("yes" if need in dialect.capabilities else "" for dialect in DIALECTS.values())


def dialects() -> Iterator[Row]:
    yield "", *DIALECTS
    for title, attribute in {
        "slots by default": "slots",
        "sent beyond its slots": "overcommit",
        "health check: GET": "health_path",
        "while requests run there": "health_path_in_use",
        "asked what it serves": "info_paths",
    }.items():
        yield title, *(shown(getattr(dialect, attribute)) for dialect in DIALECTS.values())


def shown(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(f"`{each}`" for each in value) if isinstance(value, tuple) else f"`{value}`"


def presets() -> Iterator[Row]:
    chosen = {
        **{preset: f"`task_type: {task}`" for task, preset in BY_TASK.items()},
        "deterministic": "otherwise, with `urgency: high`",
        "balanced": "otherwise",
    }
    fields = list(PRESETS["balanced"])
    yield "preset", *fields, "chosen by"
    for name, values in PRESETS.items():
        yield name, *(f"{values[field]:g}" for field in fields), chosen[name]


def clients() -> Iterator[Row]:
    """What `python -m tests.e2e.clients` found."""
    rows: list[dict[str, str]] = json.loads(CLIENTS.read_text())
    yield tuple(rows[0])
    for row in rows:
        yield tuple(row.values())


def measured(name: str) -> dict[str, Any]:
    """A result file, as the command that measured it wrote it."""
    result: dict[str, Any] = json.loads((DOCS.parent / "bench" / "results" / f"{name}.json").read_text())
    return result


def conditions(result: dict[str, Any]) -> Iterator[Row]:
    found = result["conditions"]
    machine = found["machine"]
    memory = f"{machine['memory_bytes'] / 1e9:.0f} GB"
    yield "conditions", ""
    yield "command", found["command"]
    yield "date", found["date"]
    yield "machine", f"{machine['cpu']}, {machine['cores']} cores, {memory}, {machine['os']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def rooms() -> str:
    """The packages in the order in which a request meets them: a heading, their sentence, their modules."""
    return "".join(
        f"\n### {title(folder)}\n\n{first_sentence(folder / '__init__.py')}\n\n{modules(folder)}"
        for folder in packages()
    )


def packages() -> list[Path]:
    """Raises ValueError if ORDER lacks one."""
    inner = (file.parent for file in PACKAGE.rglob("__init__.py") if file.parent != PACKAGE)
    return [PACKAGE, *sorted(inner, key=lambda folder: (ORDER.index(folder.relative_to(PACKAGE).parts[0]), folder))]


def title(folder: Path) -> str:
    return "The package itself" if folder == PACKAGE else f"`{folder.relative_to(PACKAGE)}/`"


def modules(folder: Path) -> str:
    files = sorted(folder.glob("[a-z]*.py"))
    rows = [(f"[{file.stem}](../{file.relative_to(DOCS.parent)})", first_sentence(file)) for file in files]
    return markdown(iter([("module", "what it does"), *rows]))


def first_sentence(file: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0].split())
    found = re.match(r".*?[.?!](?= [A-Z`/]|$)", text)
    return found[0] if found else text


def engines(table: Callable[[engine_results.Results], Iterator[Row]], name: str) -> Iterator[Row]:
    """A table of bench/results/engines-NAME.json; before its first run, the place where it will be."""
    file = DOCS.parent / "bench" / "results" / f"engines-{name}.json"
    if not file.exists():
        return iter([("not measured yet",)])
    return table(engine_results.read(file))


# Measurements


def spread(figures: list[float], digits: int = 3) -> str:
    """The median, and the range where there are several: `12.3 (12.0-12.7)` with an en dash."""
    middle, *ends = [number(each, digits) for each in (statistics.median(figures), min(figures), max(figures))]
    return f"{middle} ({'–'.join(ends)})" if len(figures) > 1 else middle


def number(value: float, digits: int = 3) -> str:
    """With `digits` significant digits, and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def computed(content: dict[str, Any]) -> str:
    """The lines below figures that were computed from other result files: the command, and how those were measured."""
    sources = {each["file"]: each for each in content["measured"] if "machine" in each}
    measurements = "".join(f"- {file}: {provenance(each)}" for file, each in sources.items())
    return (
        f"Computed by `{content['conditions']['command']}`.\n\n"
        f"<details><summary>How these files were measured</summary>\n\n{measurements}\n</details>\n"
    )


def cost_runs(content: dict[str, Any]) -> Iterator[Row]:
    unit = content["currency"]
    costs = [f"{unit} per 1,000 requests", f"{unit} per million output tokens"]
    yield "machine", f"{unit} per hour", "engine", "load", "goodput, requests/s", "utilisation", *costs
    per_hour = {each["name"]: hourly(each) for each in content["machines"]}
    for subject in content["subjects"]:
        for run in subject["runs"]:
            figures = (ranged(run[each]) for each in ("requests", "output_tokens"))
            place = subject["machine"], per_hour[subject["machine"]], subject["subject"], run["load"]
            yield *place, ranged(run["goodput"]), f"{run['utilisation'] * 100:.0f} %", *figures


def hourly(machine: dict[str, Any]) -> str:
    idle, busy = number(machine["fixed"]), number(machine["fixed"] + machine["extra"])
    return idle if idle == busy else f"{idle} idle, {busy} busy"


def cost_break_even(content: dict[str, Any]) -> Iterator[Row]:
    yield "cheaper", "than", "measured", "from, requests/s", "at the loads, requests/s"
    for even in content["break_even"]:
        loads = ", ".join(
            f"above {number(each['over'])}" if each["to"] is None else f"{number(each['over'])}–{number(each['to'])}"
            for each in even["cheaper"]
        )
        pair = (f"{each['machine']} ({each['subject']})" for each in (even, even["against"]))
        yield *pair, PLACES.get(even["where"], ""), ranged(even["requests_per_s"]), loads or "none"


def ranged(figures: dict[str, float | None] | None) -> str:
    """`figures`: low, middle and high, as `xgen-proxy cost` writes them. None: without end."""
    if figures is None:
        return ""
    values = (figures[each] for each in ("low", "middle", "high"))
    low, middle, high = ("∞" if value is None else number(value) for value in values)
    return middle if low == high else f"{middle} ({low}–{high})"


def memory_guard(content: dict[str, Any]) -> Iterator[Row]:
    return guard_bench.table([guard_bench.Turn(**turn) for turn in content["turns"]])


def broken_blocks(content: dict[str, Any]) -> Iterator[Row]:
    """Of bench/blocks.py."""
    yield "cut in", "the stream went on from", "to", "cut", "resumed", "valid", "wrong"
    for row in content["rows"]:
        kind = f"{row['kind']}, held" if row["hold"] else row["kind"]
        counts = (str(row[each]) for each in ("cut", "resumed", "valid"))
        wrong = "; ".join(f"{count} × {reason}" for reason, count in row["wrong"].items())
        yield kind, row["first"], row["second"], *counts, wrong


# A table of figures: the result file in bench/results/, and the rows that its content makes, the head first.
RESULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "cost_runs": ("cost.json", cost_runs),
    "cost_break_even": ("cost.json", cost_break_even),
    "guard": ("memory-guard.json", memory_guard),
    "broken_blocks": ("blocks.json", broken_blocks),
    "broken_calls": ("blocks-calls.json", broken_blocks),
    "images": ("images-gpu.json", images_bench.table),
    "images_killed": ("images-gpu.json", images_bench.kill_table),
}
# The line with the conditions comes with the other table of the same file.
WITHOUT_CONDITIONS = {"cost_break_even", "images"}


def result(name: str) -> str:
    file, rows = RESULTS[name]
    if not (RESULT_FILES / file).exists():
        return markdown(iter([("not measured yet",)]))
    content = json.loads((RESULT_FILES / file).read_text())
    if name in WITHOUT_CONDITIONS:
        return markdown(rows(content))
    line = computed(content) if "measured" in content else provenance(content["conditions"])
    notes = "".join(f"- {note}\n" for note in content["notes"]) if name == "cost_runs" else ""
    return "\n".join(filter(None, (markdown(rows(content)), notes, line)))


TABLES: dict[str, Callable[[], Iterator[Row]]] = {
    "settings": lambda: settings(Settings),
    "backends": lambda: settings(BackendSettings, "backends.NAME."),
    "models": lambda: settings(Models, "models."),
    "aliases": alias_parts,
    "routing": lambda: settings(Routing, "routing."),
    "fallback": lambda: settings(Fallback, "fallback."),
    "limits": lambda: settings(Limits, "limits."),
    "memory_guard": lambda: settings(MemoryGuard, "memory_guard."),
    "metrics": metrics,
    "rules": rules,
    "abilities": abilities,
    "dialects": dialects,
    "presets": presets,
    "clients": clients,
    "compare_summary": lambda: summary_rows(measured("compare-smollm2")),
    "compare_costs": lambda: cost_rows(measured("compare-smollm2")),
    "compare_quality": lambda: quality_rows(measured("compare-smollm2")),
    "compare_conditions": lambda: conditions(measured("compare-smollm2")),
    "engines_cpu": lambda: engines(engine_tables.overview, "cpu"),
    "engines_cpu_loads": lambda: engines(engine_tables.latencies, "cpu"),
    "engines_cpu_ratios": lambda: engines(engine_tables.ratios, "cpu"),
    "engines_cpu_conditions": lambda: engines(engine_tables.conditions, "cpu"),
    "engines_gpu": lambda: engines(engine_tables.overview, "gpu"),
    "engines_gpu_claims": lambda: engines(engine_tables.claims, "gpu"),
    "engines_gpu_loads": lambda: engines(engine_tables.latencies, "gpu"),
    "engines_gpu_ratios": lambda: engines(engine_tables.ratios, "gpu"),
    "engines_gpu_conditions": lambda: engines(engine_tables.conditions, "gpu"),
    "engines_gpu_small": lambda: engines(engine_tables.latencies, "gpu-small"),
    "engines_gpu_small_conditions": lambda: engines(engine_tables.conditions, "gpu-small"),
    "engines_knobs": lambda: engines(engine_tables.knobs, "knobs"),
    "vllm_flags": lambda: engines(advice.flags, "knobs"),
    "engines_knobs_conditions": lambda: engines(engine_tables.conditions, "knobs"),
    "engines_two_gpus": lambda: engines(engine_tables.latencies, "two-gpus"),
    "engines_two_gpus_conditions": lambda: engines(engine_tables.conditions, "two-gpus"),
}


PAGES = (*DOCS.glob("*.md"), DOCS.parent / "backends" / "vllm" / "README.md")  # those with tables


def rendered(text: str) -> str:
    """The page with its tables as the code has them now. Raises KeyError for an unknown table."""
    return PLACE.sub(lambda place: place[1] + render(place[2]) + place[3], text)


def render(name: str) -> str:
    if name in RESULTS:
        return result(name)
    return rooms() + "\n" if name == "rooms" else markdown(TABLES[name]())


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
