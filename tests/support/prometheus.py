"""A real Prometheus and promtool in Docker, configured by deploy/, with targets of the test's choice."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.documents import ROOT
from tests.support.real_servers import free_port
from tests.support.waiting import wait_until

DEPLOYED = ROOT / "deploy" / "prometheus"
IMAGE = "prom/prometheus:v3.1.0"


def docker(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run docker. `stdout` has both its output and its errors."""
    done = subprocess.run(["docker", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 or not check, f"docker {' '.join(args)}:\n{done.stdout}"
    return done


def unavailable_reason() -> str | None:
    """Why Prometheus cannot be started here; None if it can."""
    try:
        if docker("info", check=False).returncode:
            return "no Docker engine answers"
    except FileNotFoundError:
        return "there is no docker command"
    if (
        docker("image", "inspect", IMAGE, check=False).returncode
        and docker("pull", "-q", IMAGE, check=False).returncode
    ):
        return f"the image {IMAGE} cannot be pulled"
    return None


def promtool(*args: str) -> subprocess.CompletedProcess[str]:
    """Run promtool in deploy/prometheus."""
    mount = ["--volume", f"{DEPLOYED}:/deployed:ro", "--workdir", "/deployed"]
    return docker("run", "--rm", *mount, "--entrypoint", "promtool", IMAGE, *args, check=False)


@dataclass
class Prometheus:
    """A Prometheus with the deployed configuration, but with `targets` (HOST:PORT by job name) instead of DNS
    names, and a scrape every second instead of every 15 s."""

    directory: Path
    targets: dict[str, list[str]]
    port: int = field(default_factory=free_port)

    @property
    def name(self) -> str:
        return f"xgen-test-prometheus-{self.port}"

    def start(self) -> Prometheus:
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(self._config()))
        (self.directory / "rules").mkdir()  # the mount point for Docker
        docker(
            "run", "--detach", "--rm", "--name", self.name, "--network", "host",
            "--user", f"{os.getuid()}:{os.getgid()}",
            "--volume", f"{self.directory}:/config:ro", "--volume", f"{DEPLOYED}/rules:/config/rules:ro",
            "--tmpfs", "/data:mode=1777", "--entrypoint", "prometheus", IMAGE,
            "--config.file=/config/prometheus.yml", "--storage.tsdb.path=/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        )  # fmt: skip
        wait_until(self._ready, 60, "Prometheus to be ready")
        return self

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        jobs = {job["job_name"]: job for job in config["scrape_configs"]}
        config["scrape_configs"] = [
            {**without_targets(jobs[name]), "static_configs": [{"targets": targets}]}
            for name, targets in self.targets.items()
        ]
        return config

    def _ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expr: str) -> list[dict[str, str]]:
        """The labels of each current result, without NaN. Fails if the expression is invalid."""
        answer = httpx.post(f"http://127.0.0.1:{self.port}/api/v1/query", data={"query": expr}, timeout=20).json()
        assert answer["status"] == "success", answer
        assert answer["data"]["resultType"] == "vector", answer
        return [each["metric"] for each in answer["data"]["result"] if not math.isnan(float(each["value"][1]))]

    def stop(self) -> None:
        docker("rm", "--force", self.name)


def without_targets(job: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in job.items() if not key.endswith("_sd_configs") and key != "static_configs"}
