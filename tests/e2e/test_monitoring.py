"""Every expression of an alert, rule or panel finds data in a real Prometheus that scrapes a proxy under load.

promtool runs the tests of the rules.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support import prometheus
from tests.support.documents import ROOT
from tests.support.fake_upstream import FakeUpstream, Talk, delta, good, status
from tests.support.prometheus import DEPLOYED, Prometheus, promtool
from tests.support.real_servers import Proxy
from tests.support.unavailable import unavailable
from tests.support.waiting import wait_until

RULES = [
    rule
    for file in sorted((DEPLOYED / "rules").glob("*.yml"))
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
RECORDED = [rule for rule in RULES if "record" in rule]
ALERTS = [rule for rule in RULES if "alert" in rule]
BOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "xgen-proxy.json").read_text())
PANELS = [each for panel in BOARD["panels"] for each in (panel, *(panel.get("panels") or ()))]
SHOWN = [
    pytest.param(target["expr"], target.get("legendFormat", ""), id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel.get("targets", [])
]
CACHE_COUNTERS = re.compile(r"^(vllm:prefix_cache_(?:queries|hits)_total\S* )(\S+)", re.MULTILINE)
SELECTOR = re.compile(
    r"(?<![\w:.$])((?:up|ALERTS|[a-z]*:?xgen[\w:]*|device_class:\w+:\w+|vllm:\w+)(?:\{[^}]*\})?)(?![\w(])"
)


@pytest.fixture(scope="session", autouse=True)
def docker() -> None:
    why = prometheus.unavailable_reason()
    if why:
        unavailable(f"NOT TESTED WITH PROMETHEUS: {why}")


# promtool


def test_promtool_accepts_the_configuration() -> None:
    done = promtool("check", "config", "--lint-fatal", "prometheus.yml")
    assert done.returncode == 0, done.stdout
    assert "2 rule files found" in done.stdout


@pytest.mark.parametrize("file", ["recording.yml", "alerts.yml"])
def test_promtool_accepts_the_rules(file: str) -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", f"rules/{file}")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted((DEPLOYED / "tests").glob("*.yml")), ids=lambda file: file.stem)
def test_alerts_fire_only_when_they_should(file: Path) -> None:
    done = promtool("test", "rules", f"tests/{file.name}")
    assert done.returncode == 0, done.stdout


# The loaded stack


class Engine(FakeUpstream):
    """A scripted engine with the metrics page of a real one."""

    page = ""
    scrapes = 0

    async def answer_check(self, talk: Talk) -> None:
        if talk.path == "/metrics":
            self.scrapes += 1
            page = CACHE_COUNTERS.sub(lambda found: f"{found[1]}{float(found[2]) + self.scrapes}", self.page)
            head = f"content-type: text/plain; version=0.0.4\r\ncontent-length: {len(page)}\r\n\r\n"
            await talk.send(f"HTTP/1.1 200 OK\r\n{head}{page}".encode())
        elif talk.path == "/props":  # llama-server's
            await talk.answer(200, {"total_slots": 2})
        else:
            await super().answer_check(talk)


def asked(talk: Talk) -> str:
    messages = talk.json.get("messages") or [{}]
    return str(messages[0].get("content", ""))


async def gpu_script(talk: Talk) -> None:
    """Does what the first message says."""
    if asked(talk) == "fail":
        await status(500)(talk)
    elif asked(talk) == "break":
        await talk.start_stream()
        await talk.event(delta("Once "))
        talk.reset()
    else:
        await cpu_script(talk)


async def cpu_script(talk: Talk) -> None:
    if asked(talk) in ("hold", "silent"):
        if asked(talk) == "hold":
            await talk.start_stream()
            await talk.event(delta("wait "))
        await talk.until_client_leaves()
    else:
        await good(talk)


@dataclass
class Load:
    """Repeats everything that can happen to requests."""

    proxy: Proxy
    config: Path
    client: httpx.Client = field(default_factory=lambda: httpx.Client(verify=False))  # no TLS here

    def round(self) -> None:
        for prompt in ("hello", "fail", "hello", "break", "hello"):
            assert self.ask(prompt, stream=True).status_code == 200
            assert self.ask("hello").status_code == 200
        assert self.ask("a " * 200).status_code == 200
        assert self.ask("break", {"X-Continuation": "none"}, stream=True).status_code == 200
        assert self.ask("hello", temperature="hot").status_code == 400
        assert self.ask("hello", model="unknown").status_code == 404
        self.drain("silent")
        self.crowd()
        self.reload()

    def ask(self, prompt: str, headers: Any = None, timeout: float = 20, **fields: Any) -> httpx.Response:
        return self.client.post(**self.request(prompt, **fields), headers=headers, timeout=timeout)

    def request(self, prompt: str, **fields: Any) -> dict[str, Any]:
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **fields}
        return {"url": f"{self.proxy.url}/v1/chat/completions", "json": body}

    def drain(self, prompt: str, **fields: Any) -> None:
        with pytest.raises(httpx.TimeoutException):
            self.ask(prompt, timeout=0.2, **fields)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold one slot of the CPU. The client disconnects in mid-answer."""
        with self.client.stream("POST", **self.request("hold", stream=True, **ON_CPU), timeout=20) as answer:
            pieces = answer.iter_raw()  # the connection is closed with it
            assert next(pieces)
            yield

    def crowd(self) -> None:
        """With two held slots and a queue of two: of three requests one is rejected at once and two when they time
        out; one disconnects in the queue; and one is served from the queue."""
        with ThreadPoolExecutor() as pool, self.held():
            with self.held():
                crowd = [pool.submit(partial(self.ask, "hello", **ON_CPU)) for _ in range(3)]
                assert [each.result().status_code for each in crowd] == [429, 429, 429]
                self.drain("hello", **ON_CPU)
                lucky = pool.submit(partial(self.ask, "hello", **ON_CPU))
                wait_until(lambda: self.metric("xgen_queue_requests"), 10, "a request to wait")
            assert lucky.result().status_code == 200

    def all_up(self) -> bool:
        return all(replica["up"] for backend in self.status()["backends"] for replica in backend["replicas"])

    def status(self) -> Any:
        return self.client.get(f"{self.proxy.url}/models/status", timeout=10).json()

    def reload(self) -> None:
        good_settings = self.config.read_text()
        assert self.proxy.process
        self.config.write_text("nonsense = 1\n")
        refused = 'xgen_config_reloads_total{result="refused"}'
        before = self.metric(refused)
        self.proxy.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.metric(refused) > before, 10, "the settings to be refused")
        self.config.write_text(good_settings)

    def metric(self, series: str) -> float:
        """A metric as the proxy reports it."""
        page = self.client.get(f"{self.proxy.url}/metrics", timeout=10).text
        found = re.search(rf"^{re.escape(series)} (\S+)", page, re.MULTILINE)
        return float(found[1]) if found else 0.0


ON_CPU: dict[str, Any] = {"backend": "llama_cpp", "fallback": "none"}
SETTINGS = """
scrape_interval_s = 0.2
[backends.vllm]
urls = ["{gpu}"]
slots = 256
[backends.llama_cpp]
urls = ["{cpu}"]
dialect = "llama-server"
[backends.short]
urls = ["{short}"]
dialect = "vllm"
[memory_guard]
enabled = true
relief = "reset_prefix_cache"
[limits]
queue = 2
queue_timeout_s = 3
"""
SHORT_OF_MEMORY = """\
vllm:num_requests_running{engine="0"} 0
vllm:num_requests_waiting{engine="0"} 0
vllm:kv_cache_usage_perc{engine="0"} 1
vllm:num_preemptions_total{engine="0"} 3
"""


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, Engine]]:
    gpu, cpu = Engine(default=gpu_script), Engine(default=cpu_script)
    gpu.page = (ROOT / "tests/fixtures/metrics/vllm-0.32.0-metrics-loaded.txt").read_text()
    cpu.page = "llamacpp:requests_processing 1\nllamacpp:requests_deferred 0\n"
    yield gpu, cpu
    gpu.close()
    cpu.close()


@pytest.fixture(scope="module")
def short() -> Iterator[Engine]:
    """A vLLM whose KV cache is full, with a model that nothing asks for."""
    engine = Engine(models=["rarely-used"])
    engine.page = SHORT_OF_MEMORY
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def load(
    engines: tuple[Engine, Engine], short: Engine, start_proxy: Callable[..., Proxy], tmp_path_factory: Any
) -> Iterator[Load]:
    config = tmp_path_factory.mktemp("monitored") / "xgen-proxy.toml"
    gpu, cpu = engines
    config.write_text(SETTINGS.format(gpu=gpu.url, cpu=cpu.url, short=short.url))
    load = Load(start_proxy(env={"XGEN_CONFIG": str(config)}), config)
    wait_until(load.all_up, 30, "the engines to be up")
    yield load
    load.proxy.stop()


@pytest.fixture(scope="module")
def scraping(
    engines: tuple[Engine, Engine], load: Load, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    gpu, cpu = engines
    server = Prometheus(
        tmp_path_factory.mktemp("prometheus"),
        {
            "proxy": [f"127.0.0.1:{load.proxy.port}"],
            "vllm": [f"127.0.0.1:{gpu.port}"],
            "llama-cpp": [f"127.0.0.1:{cpu.port}"],
        },
    )
    try:
        yield server.start()
    finally:
        server.stop()


@dataclass
class Loaded:
    """A Prometheus that scrapes a stack under load."""

    server: Prometheus
    working: Future[None]

    def find(self, expr: str) -> list[dict[str, str]]:
        """The labels of the results, once there are any."""
        expr = expr.replace("$__rate_interval", "30s")
        return wait_until(lambda: self.query(expr), 60, f"data for {expr}")

    def query(self, expr: str) -> list[dict[str, str]]:
        if self.working.done():
            self.working.result()  # raises its exception
        return self.server.query(expr)


@pytest.fixture(scope="module")
def loaded(scraping: Prometheus, load: Load) -> Iterator[Loaded]:
    """Under load until the end of the module."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            load.round()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        yield Loaded(scraping, working)
        over.set()
    working.result()


@pytest.mark.parametrize(("expr", "legend"), SHOWN)
def test_every_panel_shows_data_with_its_labels(loaded: Loaded, expr: str, legend: str) -> None:
    for series in loaded.find(expr):
        assert all(series.get(label) for label in re.findall(r"{{(\w+)}}", legend)), series


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_every_recording_rule_records(loaded: Loaded, rule: dict[str, str]) -> None:
    """With the labels of its level."""
    level = rule["record"].partition(":")[0]
    labels = {"xgen": set(), "replica": {"backend", "replica"}}.get(level, {level})
    for series in loaded.find(rule["expr"]) + loaded.find(rule["record"]):
        assert {name for name, value in series.items() if value and name != "__name__"} == labels, series


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_reads_existing_series(loaded: Loaded, rule: dict[str, Any]) -> None:
    loaded.query(rule["expr"])
    selectors = SELECTOR.findall(rule["expr"])
    assert selectors
    for selector in selectors:
        assert loaded.find(selector)


def test_the_load_is_what_prometheus_measures(loaded: Loaded) -> None:
    """The values are right, where they are known for certain."""
    assert loaded.find('ALERTS{alertname="XgenStreamsLost", alertstate="firing"} == 1')
    assert loaded.find('xgen_config_reloads_total{result="refused"} > 0')
    assert loaded.find('xgen_fallbacks_total{backend="vllm", to="llama_cpp"} > 0')
    assert loaded.find('xgen_continuations_total{backend="llama_cpp"} > 0')
    for reason in ("queue_full", "queue_timeout"):
        assert loaded.find(f'xgen_admission_rejections_total{{reason="{reason}"}} > 0')
    for stage in ("queued", "waiting", "answering"):
        assert loaded.find(f'xgen_cancellations_total{{stage="{stage}"}} > 0')
    assert loaded.find('xgen_replica_memory_pressure{backend="short"} == 2')
    assert loaded.find('xgen_memory_relief_total{backend="short", result="done"} > 0')
    assert loaded.find("0 < xgen:requests_failed:ratio_rate5m < 0.5")
    assert loaded.find('device_class:xgen_replicas_up:sum{device_class="cpu"} == 1')
    assert loaded.query('ALERTS{alertname=~"XgenProxyDown|XgenNoBackendUp|XgenTargetDown"}') == []
