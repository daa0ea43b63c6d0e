"""compose.yaml as shipped, on a real Docker engine, while containers are stopped, killed and added.

The GPU is a stand-in, a second llama.cpp server in vLLM's place, and so are images that cannot be had here. The engine
is llama-server, which needs no compiling: XGEN_TEST_ENGINE=llama-cpp-python tests the other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest

from tests.support import compose_stack
from tests.support.compose_stack import ROOT, Stack, docker, has_image, inspect
from tests.support.proxied_backend import CAPITAL, NEVER_ENDING
from tests.support.real_servers import MODEL
from tests.support.unavailable import unavailable
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(1800)  # images are built, and everything is slow under load

ENGINE = os.environ.get("XGEN_TEST_ENGINE", "llama-server")
BUILD_S = 1500
UP_S = 600
ONE_SHOT = {"certificate", "model"}
OURS = {
    "proxy",
    "llama-cpp",
    "nginx",
    "prometheus",
    "grafana",
    *ONE_SHOT,
}  # without privileges; vllm's image is not ours

# In place of vLLM, on a machine without a GPU: the CPU backend's server, with its dialect configured.
STAND_IN = f"""
services:
  proxy:
    environment:
      XGEN_BACKENDS__VLLM__DIALECT: {ENGINE}
      XGEN_BACKENDS__VLLM__DEVICE_CLASS: gpu
      XGEN_BACKENDS__VLLM__SLOTS: 4
      XGEN_BACKENDS__VLLM__CHAT_TEMPLATE: /template/tokenizer_config.json
  vllm:
    image: xgen-{ENGINE}
    depends_on:
      model: {{condition: service_completed_successfully}}
    entrypoint: !reset null
    command: !override [python, -m, backends.llama_cpp.container]
    environment: !override {{MODEL_NAME: {MODEL}, CPUS: "1"}}
    volumes: !override ["models:/models:ro"]
    healthcheck: !override {{test: [CMD, python, -m, backends.healthcheck], interval: 5s, start_period: 120s}}
    init: true
    deploy: !reset null
"""

# A substitute for Grafana's image where it cannot be pulled.
NO_GRAFANA = """
FROM python:3.11-slim
RUN mkdir -p /www/api && touch /www/api/health && ln -s /usr/bin/true /usr/local/bin/wget
CMD ["python", "-m", "http.server", "--directory", "/www", "3000"]
"""

CONNECT_OUT = "import socket; socket.create_connection(('1.1.1.1', 53), 3)"
ELSEWHERE = ROOT / "deploy" / "vllm-elsewhere.yaml"


@pytest.fixture(scope="module")
def with_docker() -> None:
    try:
        compose_stack.check_docker()
    except compose_stack.UnavailableError as error:
        unavailable(f"NOT TESTED IN CONTAINERS: {error}")


@pytest.fixture(scope="module")
def images(with_docker: None) -> dict[str, str]:
    """Settings with other images, where those of compose.yaml cannot be pulled."""
    named = compose_stack.variables()
    docker_image = ROOT / "tests" / "support" / "nginx_image.sh"
    subprocess.run([str(docker_image), named["NGINX_IMAGE"]], check=True, capture_output=True, timeout=600)
    settings = {}
    if not had(named["GRAFANA_IMAGE"]):
        docker("build", "--tag", "xgen-test-grafana", "-", input=NO_GRAFANA, timeout=300)
        settings["GRAFANA_IMAGE"] = "xgen-test-grafana"
    prometheus = named["PROMETHEUS_IMAGE"]
    if had(prometheus) and not folder_of_its_own(prometheus):
        own = f"FROM {prometheus}\nRUN install -d -o 65534 -g 65534 /prometheus\n"
        docker("build", "--tag", "xgen-test-prometheus", "-", input=own, timeout=300)
        settings["PROMETHEUS_IMAGE"] = "xgen-test-prometheus"
    return settings


def had(image: str) -> bool:
    return has_image(image) or subprocess.run(["docker", "pull", "-q", image], capture_output=True).returncode == 0


def folder_of_its_own(image: str) -> bool:
    command = ["docker", "run", "--rm", "--entrypoint", "ls", image, "-d", "/prometheus"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def stack(images: dict[str, str]) -> Iterator[Stack]:
    """Two proxies, a llama.cpp server and one in place of vLLM, nginx and monitoring, all healthy."""
    made = Stack({"ENGINE": ENGINE, "LLAMA_CPP_CPUS": "1", **images}, STAND_IN)
    made.settings["CONFIG_DIR"] = str(made.readable_folder("config"))
    try:
        made.compose("build", timeout=BUILD_S)
        made.compose("up", "--detach", "--wait", "--scale", "proxy=2", timeout=UP_S)
        yield made
    finally:
        made.down()
        shutil.rmtree(made.folder)


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """Without retries, so that every failure shows."""
    trusts = ssl.create_default_context(cafile=str(stack.certificate()))
    url = f"https://localhost:{stack.https}/v1"
    with openai.DefaultHttpxClient(verify=trusts, timeout=120) as http:
        yield openai.OpenAI(base_url=url, api_key="none", http_client=http, max_retries=0)


# -- load -------------------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """One streamed answer as the client sees it."""

    id: str = ""
    backend: str = ""
    replica: str = ""
    chunks: int = 0
    finish: str | None = None
    error: str = ""

    @property
    def whole(self) -> bool:
        return self.finish == "length" and not self.error


@dataclass
class Load:
    """`clients` that request one stream of `tokens` after another until stopped."""

    client: openai.OpenAI
    clients: int = 6
    tokens: int = 24
    hints: dict[str, Any] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self.clients)
        self._futures = [self._pool.submit(self._ask_on, number) for number in range(self.clients)]
        return self

    def __exit__(self, *args: object) -> None:
        self.over.set()
        for future in self._futures:
            future.result(300)
        self._pool.shutdown()

    def _ask_on(self, number: int) -> None:
        for turn in range(1000):
            if self.over.is_set():
                return
            stream = Stream(id=f"test-{number}-{turn}-{time.monotonic_ns()}")
            self.streams.append(stream)
            self._ask(stream)

    def _ask(self, stream: Stream) -> None:
        headers = {"X-Request-Id": stream.id}
        try:
            answer = self.client.chat.completions.with_raw_response.create(
                messages=CAPITAL,
                model=MODEL,
                max_tokens=self.tokens,
                stream=True,
                extra_body={**NEVER_ENDING, **self.hints},
                extra_headers=headers,
            )
            stream.backend, stream.replica = answer.headers["x-backend"], answer.headers["x-replica"]
            for chunk in answer.parse():
                stream.chunks += 1
                stream.finish = chunk.choices[0].finish_reason or stream.finish if chunk.choices else stream.finish
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            stream.error = repr(error)

    def done(self) -> int:
        return sum(1 for stream in self.streams if stream.finish)

    def wait(self, more: int) -> None:
        """Wait until `more` answers are complete."""
        before = self.done()
        wait_until(lambda: self.done() >= before + more, 240, f"{more} more answers; {self.failed()}")

    def under_way(self, count: int) -> list[Stream]:
        """Wait for `count` streams that are neither new nor nearly finished."""

        def begun() -> list[Stream]:
            return [each for each in self.streams if 0 < each.chunks < self.tokens // 2 and not each.error]

        return wait_until(
            lambda: begun() if len(begun()) >= count else None, 120, f"{count} live streams; {self.failed()}"
        )

    def failed(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.error]


# -- health and isolation ----------------------------------------------------------------------------------------------


def test_everything_is_healthy(stack: Stack) -> None:
    states = {each["Config"]["Labels"]["com.docker.compose.service"]: each["State"] for each in stack.all_containers()}
    assert set(states) == OURS | {"vllm"}
    for service, state in states.items():
        if service in ONE_SHOT:
            assert (state["Status"], state["ExitCode"]) == ("exited", 0), service
        else:
            assert state["Health"]["Status"] == "healthy", service


def test_only_nginx_is_reachable_from_outside(stack: Stack) -> None:
    for each in stack.all_containers():
        service = each["Config"]["Labels"]["com.docker.compose.service"]
        open_at = {binding["HostIp"] for found in each["NetworkSettings"]["Ports"].values() for binding in found or []}
        assert not open_at or service in ("nginx", "prometheus", "grafana"), service
        assert open_at <= {"127.0.0.1"}, "monitoring must listen on loopback only, and nginx by default too"
    assert json.loads(docker("network", "inspect", f"{stack.project}_inside"))[0]["Internal"]
    with pytest.raises(AssertionError):
        docker("exec", stack.containers("proxy")[0], "python", "-c", CONNECT_OUT)


def test_a_vllm_elsewhere_gives_the_proxies_a_way_out_and_nobody_else(stack: Stack) -> None:
    merged = json.loads(stack.compose("config", "--format", "json", extra=[ELSEWHERE]))
    assert set(merged["services"]["proxy"]["networks"]) == {"inside", "elsewhere"}
    assert [name for name, each in merged["services"].items() if "elsewhere" in each.get("networks", ())] == ["proxy"]
    assert not merged["networks"]["elsewhere"].get("internal")


def test_containers_have_few_privileges(stack: Stack) -> None:
    for each in stack.all_containers():
        service, host = each["Config"]["Labels"]["com.docker.compose.service"], each["HostConfig"]
        assert host["CapDrop"] == ["ALL"], service
        assert host["CapAdd"] in (None, ["CAP_CHOWN"] if service == "certificate" else []), service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "5"}, service
        if service in OURS:
            assert host["ReadonlyRootfs"], service
            assert host["Memory"] or service in ONE_SHOT, service
        if service in OURS - ONE_SHOT - {"grafana"}:
            assert docker("exec", each["Id"], "id", "-u") != "0", service


def test_images_contain_no_compiler(stack: Stack) -> None:
    for service in ("proxy", "llama-cpp"):
        tools = "for tool in cc gcc g++ c++ clang cmake ninja make ld; do command -v $tool; done; true"
        assert docker("exec", stack.containers(service)[0], "sh", "-c", tools) == ""
        labels = inspect(stack.containers(service)[0])["Config"]["Labels"]
        assert labels["org.opencontainers.image.licenses"]


def test_docker_waits_longer_than_the_proxy_drains(stack: Stack) -> None:
    proxy = inspect(stack.containers("proxy")[0])
    [drain] = [each for each in proxy["Config"]["Env"] if each.startswith("XGEN_DRAIN_S=")]
    assert proxy["Config"]["StopTimeout"] > float(drain.partition("=")[2]) + 5


def test_the_openai_sdk_streams_over_tls(client: openai.OpenAI) -> None:
    pieces = client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        max_tokens=12,
        temperature=0,
        stream=True,
    )
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)


def test_the_log_shows_the_clients_address(stack: Stack, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="Hi", max_tokens=1, extra_headers={"X-Request-Id": "who-asks"})
    outer = stack.access_log()["who-asks"]["client"]
    lines = [
        json.loads(line)
        for proxy in stack.containers("proxy")
        for line in compose_stack.log(proxy)
        if "who-asks" in line
    ]
    assert [each["client"] for each in lines] == [outer]


def test_a_settings_file_is_reloaded_without_restart(stack: Stack, client: openai.OpenAI) -> None:
    """As in .env.example: every proxy reads and watches a folder of the host."""
    file = Path(stack.settings["CONFIG_DIR"]) / "xgen-proxy.toml"

    file.write_text("[limits]\nbody_bytes = 2000\n")
    try:
        wait_until(partial(logged, stack, "new settings"), 60, "each proxy to have taken them")
        for _ in range(4):
            with pytest.raises(openai.APIStatusError) as refused:
                client.completions.create(model=MODEL, prompt="x" * 2000, max_tokens=1)
            assert refused.value.status_code == 413
    finally:
        file.unlink()
    wait_until(partial(logged, stack, "new settings", times=2), 60, "each proxy to have gone back")
    assert client.completions.create(model=MODEL, prompt="x" * 2000, max_tokens=1).choices


def logged(stack: Stack, text: str, times: int = 1) -> bool:
    return all(sum(text in line for line in compose_stack.log(proxy)) >= times for proxy in stack.containers("proxy"))


def test_the_image_can_export_traces(stack: Stack) -> None:
    proxy = stack.containers("proxy")[0]
    output = docker("exec", "--env", "XGEN_OTLP_ENDPOINT=http://collector:4318", proxy, "xgen-proxy", "check")
    assert "http://collector:4318" in output


def test_plain_http_redirects_to_tls(stack: Stack) -> None:
    answer = httpx.get(f"http://localhost:{stack.http}/v1/models")
    assert answer.status_code == 308
    assert answer.headers["location"].startswith("https://localhost")


def test_prometheus_sees_both_proxies(stack: Stack) -> None:
    def up() -> bool:
        url = f"http://127.0.0.1:{stack.prometheus}/api/v1/query"
        found = httpx.get(url, params={"query": 'sum(up{job="proxy"})'}).json()["data"]["result"]
        return bool(found) and found[0]["value"][1] == "2"

    wait_until(up, 60, "Prometheus to have scraped both")


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_killed_backend_loses_no_request(stack: Stack, client: openai.OpenAI) -> None:
    [llama_cpp] = stack.containers("llama-cpp")
    with Load(client) as load:
        wait_until(
            lambda: {each.backend for each in load.under_way(4)} == {"vllm", "llama_cpp"}, 120, "both to be used"
        )
        docker("kill", llama_cpp)
        load.wait(more=8)
        docker("start", llama_cpp)
    assert not load.failed()
    assert all(stream.whole for stream in load.streams)
    assert {stream.backend for stream in load.streams} == {"vllm", "llama_cpp"}
    wait_until(partial(all_up, stack), 90, "the killed one to be up again")


def all_up(stack: Stack, count: int = 2) -> bool:
    seen = [stack.replicas(each) for each in stack.containers("proxy")]
    return all(len(each) == count and set(each.values()) <= {"up"} for each in seen)


def test_a_rolling_restart_loses_no_request(stack: Stack, client: openai.OpenAI) -> None:
    first, second = stack.containers("proxy")
    addresses = {stack.address(first), stack.address(second)}
    with Load(client) as load:
        for proxy in (first, second):
            load.under_way(3)
            docker("stop", proxy)  # with the stop_grace_period of compose.yaml
            assert inspect(proxy)["State"]["ExitCode"] == 0, "the proxy was killed before it had drained"
            load.wait(more=3)
            docker("start", proxy)
            wait_until(partial(is_healthy, proxy), 90, "the proxy to be healthy again")
        load.wait(more=6)
    served = stack.access_log()
    assert not [f"{each}\n{served.get(each.id)}" for each in load.streams if not each.whole]
    used = {line["proxy"].partition(":")[0] for line in served.values() if line["path"].startswith("/v1")}
    assert len(used) >= 2 or addresses <= used


def test_an_upgrade_loses_no_request(stack: Stack, client: openai.OpenAI) -> None:
    """As in docs/operations.md: new containers start beside the old ones, which then end."""
    old = stack.containers("proxy")
    more = ["up", "--detach", "--wait", "--no-recreate", "--no-deps", "--scale", "proxy=4", "proxy"]
    with Load(client) as load:
        load.under_way(3)
        stack.compose(*more)
        docker("stop", *old)
        docker("rm", *old)
        load.wait(more=6)
    served = stack.access_log()
    assert not [f"{each}\n{served.get(each.id)}" for each in load.streams if not each.whole]
    new = stack.containers("proxy")
    assert len(new) == 2
    assert not set(new) & set(old)


def health(container: str) -> str:
    return str(inspect(container)["State"]["Health"]["Status"])


def is_healthy(container: str) -> bool:
    return health(container) == "healthy"


def test_a_killed_proxy_loses_only_its_own_started_answers(stack: Stack, client: openai.OpenAI) -> None:
    first, _ = stack.containers("proxy")
    victim = f"{stack.address(first)}:8080"
    with Load(client, clients=8) as load:
        load.under_way(4)
        docker("kill", first)
        load.wait(more=6)
        docker("start", first)
    lost = [stream for stream in load.streams if not stream.whole]
    served = stack.access_log()
    assert lost, "the killed proxy had no streams"
    for stream in lost:
        assert stream.chunks, f"nothing had come of it yet, so nginx could have sent it again: {stream}"
        assert served[stream.id]["proxy"].endswith(victim), stream
    wait_until(lambda: health(first) == "healthy", 90, "the proxy to be healthy again")


# -- scaling ----------------------------------------------------------------------------------------------------------


def test_scaled_backends_are_found_and_used(stack: Stack, client: openai.OpenAI) -> None:
    proxies = stack.containers("proxy")
    stack.compose("up", "--detach", "--no-recreate", "--scale", "proxy=2", "--scale", "llama-cpp=3")
    added = {stack.address(each): each for each in stack.containers("llama-cpp")[1:]}
    assert len(added) == 2
    wait_until(partial(all_up, stack, 4), 120, "both proxies to use all four backends")
    for proxy in proxies:
        for address, container in added.items():
            assert found_after(proxy, address, container) <= 5
    names = {f"llama_cpp@{stack.address(each)}:8000" for each in stack.containers("llama-cpp")}
    with Load(client, clients=8, tokens=8, hints={"backend": "llama_cpp"}) as load:
        wait_until(lambda: {each.replica for each in load.streams} >= names, 120, "all three to be used")
    assert not load.failed()


def found_after(proxy: str, address: str, container: str) -> float:
    """Seconds from the start of a backend's container until this proxy lists it."""
    lines = compose_stack.log(proxy)
    found = [line for line in lines if f"llama_cpp@{address}:8000 is listed" in line]
    assert found, "\n".join(lines[-30:])
    [*_, line] = found
    return (moment(json.loads(line)["time"]) - moment(inspect(container)["State"]["StartedAt"])).total_seconds()


def moment(text: str) -> datetime:
    """A time from Docker, whose nanoseconds Python cannot parse."""
    return datetime.fromisoformat(re.sub(r"(\.\d{3})\d*Z$", r"\1+00:00", text))


# -- shutdown ----------------------------------------------------------------------------------------------------------


def test_down_leaves_nothing(stack: Stack) -> None:
    """The last test, since it removes the stack."""
    assert stack.left()
    stack.down()
    assert stack.left() == []
