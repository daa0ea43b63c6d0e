"""The dashboard, drawn with Grafana's foundation SDK. tests/repo/test_monitoring.py fails while the file is stale.

python deploy/grafana/dashboard.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE = Path(__file__).parent / "dashboards" / "xgen-proxy.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RULES_WINDOW = "5m"  # of the recording rules

GREEN, YELLOW, RED = "green", "yellow", "red"


def query(expr: str, legend: str = "") -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).datasource(SOURCE).range()


def quantile(q: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))"


def rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def steps(*later: tuple[float, str], first: str = GREEN) -> dashboard.ThresholdsConfig:
    """`first` holds up to the first value."""
    thresholds = [Threshold(value=None, color=first), *(Threshold(value=value, color=color) for value, color in later)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(thresholds)


def placed(panel: Any, title: str, description: str, *queries: prometheus.Dataquery) -> Any:
    """Four to a row, four rows to a screen."""
    for number, each in enumerate(queries):
        panel = panel.with_target(each.ref_id("ABCDEFGH"[number]))
    return panel.title(title).description(description).datasource(SOURCE).height(6).span(6)


def lines(title: str, description: str, unit: str, *queries: prometheus.Dataquery) -> timeseries.Panel:
    """Names keep their colour from panel to panel."""
    panel: timeseries.Panel = placed(timeseries.Panel(), title, description, *queries)
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(shapes.LegendDisplayMode.LIST)
        .placement(shapes.LegendPlacement.BOTTOM)
    )
    tooltip = common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)
    return (
        panel.unit(unit)
        .min(0)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .line_width(2)
        .fill_opacity(5)
        .show_points(shapes.VisibilityMode.NEVER)
        .legend(legend)
        .tooltip(tooltip)
    )


def stacked(title: str, description: str, unit: str, *queries: prometheus.Dataquery) -> timeseries.Panel:
    panel = lines(title, description, unit, *queries).fill_opacity(40).line_width(1)
    return panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))


def latest(title: str, description: str, *queries: prometheus.Dataquery) -> stat.Panel:
    panel: stat.Panel = placed(stat.Panel(), title, description, *queries)
    return panel.height(5).reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def limit(panel: timeseries.Panel, value: float) -> timeseries.Panel:
    """Draw a red line at the limit."""
    style = common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds(steps((value, RED), first="transparent")).thresholds_style(style)


def in_color(panel: timeseries.Panel, name: str, color: str) -> timeseries.Panel:
    return panel.override_by_name(name, [DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})])


# Is it up?


def answered() -> stat.Panel:
    panel = latest(
        "Requests answered",
        "The share without a 5xx, a 429 or a lost stream. The objective is 99.5 %.",
        query("1 - xgen:requests_failed:ratio_rate5m", "last 5 minutes"),
        query("1 - xgen:requests_failed:ratio_rate1d", "last day"),
    )
    return panel.unit("percentunit").decimals(2).thresholds(steps((0.99, YELLOW), (0.995, GREEN), first=RED))


def replicas_up() -> stat.Panel:
    panel = latest(
        "Replicas up",
        "Replicas of each backend that get requests. Red: none.",
        query("backend:xgen_replicas_up:sum", "{{backend}}"),
    )
    return panel.thresholds(steps((1, GREEN), first=RED)).color_mode(shapes.BigValueColorMode.BACKGROUND)


def replica_states() -> statetimeline.Panel:
    panel: statetimeline.Panel = placed(
        statetimeline.Panel(),
        "State of each replica",
        "Breaker open: the replica answers health checks but fails requests, and gets none for a while.",
        query(
            "replica:xgen_replica_up:max + on (backend, replica) "
            '2 * max by (backend, replica) (xgen_replica_breaker_state{state!="closed"})',
            "{{replica}}",
        ),
    )
    breaker = ValueMappingResult(text="breaker open", color=YELLOW)
    states = {
        "0": ValueMappingResult(text="down", color=RED),
        "1": ValueMappingResult(text="up", color=GREEN),
        "2": breaker,
        "3": breaker,
    }
    return (
        panel.height(5)
        .mappings([ValueMap(options=states)])
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .thresholds(steps((1, GREEN), first=RED))
        .merge_values(True)
        .show_value(shapes.VisibilityMode.NEVER)
        .row_height(0.8)
        .legend(common.VizLegendOptions().show_legend(True).placement(shapes.LegendPlacement.BOTTOM))
    )


def alerts() -> table.Panel:
    panel: table.Panel = placed(
        table.Panel(),
        "Alerts that fire",
        "docs/operations.md explains each alert and its remedies.",
        query('count by (alertname, severity) (ALERTS{alertstate="firing"})').instant().format(PromQueryFormat.TABLE),
    )
    shown = DataTransformerConfig(
        "organize",
        options={
            "excludeByName": {"Time": True},
            "indexByName": {"severity": 0, "alertname": 1, "Value": 2},
            "renameByName": {"alertname": "alert", "Value": "how many"},
        },
    )
    colors = {"critical": ValueMappingResult(color=RED), "warning": ValueMappingResult(color=YELLOW)}
    severity = [
        DynamicConfigValue("mappings", [ValueMap(options=colors)]),
        DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
        DynamicConfigValue("custom.width", 90),
    ]
    return panel.height(5).no_value("none").with_transformation(shown).override_by_name("severity", severity)


# Is it fast?


def first_token() -> timeseries.Panel:
    p50, p95 = (f"backend:xgen_time_to_first_token_seconds:{q}_rate{RULES_WINDOW}" for q in ("p50", "p95"))
    panel = lines(
        "Time to the first token",
        "From the request to its first token, including the wait for a slot. "
        "The objective: 95 % of streams begin within 2.5 s.",
        "s",
        query(p95, "{{backend}} p95"),
        query(p50, "{{backend}} p50"),
    )
    return limit(panel, 2.5)


def between_chunks() -> timeseries.Panel:
    return lines(
        "Time between two chunks",
        "The mean gap of each stream. Its reciprocal is the tokens per second that a reader sees.",
        "s",
        query(quantile(0.95, "xgen_inter_chunk_seconds", "backend"), "{{backend}} p95"),
        query(quantile(0.5, "xgen_inter_chunk_seconds", "backend"), "{{backend}} p50"),
    )


def queue() -> timeseries.Panel:
    panel = lines(
        "The queue",
        "Requests that wait for a slot now, and the wait of those that had to wait.",
        "short",
        query("xgen:queue_requests:sum", "waiting"),
        query(quantile(0.95, "xgen_queue_wait_seconds"), "p95 of the wait"),
    )
    right = [DynamicConfigValue("unit", "s"), DynamicConfigValue("custom.axisPlacement", "right")]
    return panel.override_by_name("p95 of the wait", right)


def overhead() -> timeseries.Panel:
    return lines(
        "What the proxy adds",
        "The time until the first output, without the waiting for slots and backends.",
        "s",
        query(quantile(0.99, "xgen_overhead_seconds"), "p99"),
        query(quantile(0.5, "xgen_overhead_seconds"), "p50"),
    )


# Where do requests go, and why?


def by_backend() -> timeseries.Panel:
    return stacked(
        "Requests by backend",
        "The backend that answered or failed last. none: none was tried.",
        "reqps",
        query(rate("xgen_requests_total", "backend"), "{{backend}}"),
    )


def by_reason() -> timeseries.Panel:
    return stacked(
        "Requests by reason",
        "Why they went there: the first word of X-Route-Reason, explained in docs/routing.md.",
        "reqps",
        query(rate("xgen_requests_total", "reason"), "{{reason}}"),
    )


def fullness() -> timeseries.Panel:
    panel = lines(
        "How full they are",
        "The router's load: at 100 % short work spills to the CPU. KV cache: near 100 % vLLM interrupts "
        "running requests.",
        "percentunit",
        query("max by (replica) (xgen_replica_load)", "{{replica}}"),
        query("max by (instance) (vllm:kv_cache_usage_perc)", "KV cache at {{instance}}"),
    )
    return limit(panel, 1)


def tokens() -> timeseries.Panel:
    return lines(
        "Tokens",
        "Per second, in and out, if the backend reports usage.",
        "short",
        query(rate("xgen_tokens_total", "backend, type"), "{{backend}} {{type}}"),
    )


# What falls back, and what is lost?


def fallbacks() -> timeseries.Panel:
    return lines(
        "Stand-ins",
        "Requests answered by another backend than the first of their plan, and all attempts after a request's first.",
        "reqps",
        query(rate("xgen_fallbacks_total", "backend, to"), "{{backend}} → {{to}}"),
        query(rate("xgen_retries_total", "backend"), "tried again at {{backend}}"),
    )


def failed_attempts() -> timeseries.Panel:
    return stacked(
        "Attempts that failed",
        "Failed attempts. Clients rarely see them: the next candidate answers.",
        "reqps",
        query(rate("xgen_attempt_failures_total", "replica, outcome"), "{{replica}} {{outcome}}"),
    )


def broken_streams() -> timeseries.Panel:
    panel = stacked(
        "Streams that broke",
        "In each interval, by the backend that resumed them. none: none could, and the client got an error event.",
        "short",
        query("sum by (backend) (increase(xgen_continuations_total[$__rate_interval]))", "{{backend}}"),
    )
    return in_color(panel.draw_style(shapes.GraphDrawStyle.BARS).fill_opacity(80), "none", RED)


def unanswered() -> timeseries.Panel:
    return lines(
        "Not answered",
        "Errors by status (499: the client left), requests refused before routing or turned away without a slot, and "
        "the stage at which clients left.",
        "reqps",
        query(rate('xgen_requests_total{status!~"2.."}', "status"), "{{status}}"),
        query(rate("xgen_refused_requests_total", "code"), "refused {{code}}"),
        query(rate("xgen_admission_rejections_total", "reason"), "{{reason}}"),
        query(rate("xgen_cancellations_total", "stage"), "left while {{stage}}"),
    )


# Is memory short?


def pressure() -> statetimeline.Panel:
    panel: statetimeline.Panel = placed(
        statetimeline.Panel(),
        "Pressure of memory",
        "What the memory guard does with each replica. Reduced: it holds fewer requests. Closed: it gets no new work "
        "while another can do it.",
        query("max by (backend, replica) (xgen_replica_memory_pressure)", "{{replica}}"),
    )
    levels = {
        "0": ValueMappingResult(text="normal", color=GREEN),
        "1": ValueMappingResult(text="reduced", color=YELLOW),
        "2": ValueMappingResult(text="closed", color=RED),
    }
    return (
        panel.mappings([ValueMap(options=levels)])
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .thresholds(steps((1, YELLOW), (2, RED)))
        .merge_values(True)
        .show_value(shapes.VisibilityMode.NEVER)
        .row_height(0.8)
        .legend(common.VizLegendOptions().show_legend(True).placement(shapes.LegendPlacement.BOTTOM))
    )


def relief() -> timeseries.Panel:
    panel = stacked(
        "Relief",
        "Times that a replica short of memory was asked to free some, by result; with memory_guard.relief.",
        "short",
        query(
            "sum by (replica, result) (increase(xgen_memory_relief_total[$__rate_interval]))", "{{replica}} {{result}}"
        ),
    )
    return panel.draw_style(shapes.GraphDrawStyle.BARS).fill_opacity(80)


def kv_cache() -> timeseries.Panel:
    def found(counter: str) -> str:
        return f"sum by (instance) (rate(vllm:prefix_cache_{counter}_total[$__rate_interval]))"

    panel = lines(
        "KV cache of vLLM",
        "The share in use, and the share of prompt tokens that the prefix cache had already. Near 100 % in use vLLM "
        "preempts running requests.",
        "percentunit",
        query("max by (instance) (vllm:kv_cache_usage_perc)", "{{instance}} in use"),
        query(f"{found('hits')} / {found('queries')}", "{{instance}} prefix hits"),
    )
    return limit(panel, 1)


def preemptions() -> timeseries.Panel:
    return lines(
        "Preemptions of vLLM",
        "Running requests that lost their KV cache and are computed again. The first one reduces a replica.",
        "reqps",
        query(rate("xgen_preemptions_total", "replica"), "{{replica}}"),
    )


ROWS: dict[str, list[Any]] = {
    "Is it up?": [answered(), replicas_up(), replica_states(), alerts()],
    "Is it fast?": [first_token(), between_chunks(), queue(), overhead()],
    "Where do requests go, and why?": [by_backend(), by_reason(), fullness(), tokens()],
    "What falls back, and what is lost?": [fallbacks(), failed_attempts(), broken_streams(), unanswered()],
}
# Closed, so that the rest stays on one screen: it is for when a replica is short of memory.
CLOSED_ROW: tuple[str, list[Any]] = ("Is memory short?", [pressure(), kv_cache(), preemptions(), relief()])


def build() -> dashboard.Dashboard:
    board = (
        dashboard.Dashboard("XGen proxy")
        .uid("xgen-proxy")
        .description("Is it up, is it fast, where do requests go and why, what falls back?")
        .tags(["xgen"])
        .time("now-1h", "now")
        .timezone("browser")
        .refresh("10s")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for row, (title, panels) in enumerate(ROWS.items(), start=1):
        board = board.with_row(dashboard.Row(title).id(10 * row))
        for number, panel in enumerate(panels, start=1):
            board = board.with_panel(panel.id(10 * row + number))
    title, panels = CLOSED_ROW
    closed = dashboard.Row(title).id(10 * (len(ROWS) + 1))
    for number, panel in enumerate(panels, start=1):
        closed = closed.with_panel(panel.id(10 * (len(ROWS) + 1) + number))
    return board.with_row(closed)


def render() -> str:
    return JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(build().build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
