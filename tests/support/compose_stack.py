"""The stack of compose.yaml under Docker Compose, with its own project name and ports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.real_servers import free_port

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "compose.yaml"
PROFILES = ["gpu", "monitoring"]
LABEL = "com.docker.compose.project"


class UnavailableError(Exception):
    """This machine has no Docker engine or no Compose. Says why."""


def check_docker() -> None:
    """Raises UnavailableError."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            raise UnavailableError(f"{' '.join(command)}: {getattr(error, 'stderr', None) or error}") from None


def docker(*args: str, input: str | None = None, timeout: float = 120) -> str:
    done = subprocess.run(["docker", *args], input=input, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"docker {' '.join(args)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def has_image(name: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0


class Stack:
    """A stack. `settings`: the contents of .env. `override`: a second compose file, as YAML or JSON."""

    def __init__(self, settings: Mapping[str, str], override: str = "") -> None:
        self.project = f"xgen-test-{uuid.uuid4().hex[:8]}"
        self.https, self.http, self.prometheus, self.grafana = (free_port() for _ in range(4))
        self.settings = {
            "XGEN_API_KEYS": "none",
            "HTTP_PORT": str(self.http),
            "HTTPS_PORT": str(self.https),
            "PROMETHEUS_PORT": str(self.prometheus),
            "GRAFANA_PORT": str(self.grafana),
            **settings,
        }
        self.folder = Path(tempfile.mkdtemp(prefix="xgen-stack-"))
        self._files = [COMPOSE]
        if override:
            self._files.append(self.folder / "override.yaml")
            self._files[-1].write_text(override)

    def readable_folder(self, name: str) -> Path:
        """Make a folder that a container's user can read."""
        self.folder.chmod(0o755)
        made = self.folder / name
        made.mkdir(mode=0o755)
        return made

    # -- compose -------------------------------------------------------------------------------------------------------

    def compose(self, *args: str, timeout: float = 300, extra: Sequence[Path] = ()) -> str:
        """Run docker compose, with more compose files, and return its standard output."""
        command = ["docker", "compose", "--project-name", self.project, "--env-file", "/dev/null"]
        command += [part for file in (*self._files, *extra) for part in ("--file", str(file))]
        command += [part for profile in PROFILES for part in ("--profile", profile)]
        done = subprocess.run(
            [*command, *args], env=self._environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"compose {' '.join(args)}:\n{done.stderr[-3000:]}\n{self.last_log_lines()}"
        return done.stdout.strip()

    def _environment(self) -> dict[str, str]:
        known = set(variables())
        kept = {name: value for name, value in os.environ.items() if name not in known or name.startswith("PIP_")}
        return {**kept, **self.settings}

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5")

    def left(self) -> list[str]:
        """Containers, networks and volumes that still exist."""
        found = []
        for kind in ("container", "network", "volume"):
            everything = ["--all"] if kind == "container" else []
            listed = docker(kind, "ls", *everything, "--quiet", "--filter", f"label={LABEL}={self.project}")
            found += [f"{kind} {name}" for name in listed.split()]
        return found

    # -- its containers ------------------------------------------------------------------------------------------------

    def containers(self, service: str) -> list[str]:
        """The ids of a service's running containers, oldest first."""
        ids = self.compose("ps", "--quiet", service).split()
        return sorted(ids, key=lambda each: inspect(each)["Created"])

    def all_containers(self) -> list[dict[str, Any]]:
        return [inspect(each) for each in self.compose("ps", "--all", "--quiet").split()]

    def address(self, container: str) -> str:
        """The container's address in the network `inside`."""
        return str(inspect(container)["NetworkSettings"]["Networks"][f"{self.project}_inside"]["IPAddress"])

    def replicas(self, proxy: str) -> dict[str, str]:
        """The state of each replica as this proxy reports it."""
        output = docker("exec", proxy, "xgen-proxy", "status")
        return {line.split()[0]: line.split()[2] for line in output.splitlines()[1:] if "@" in line}

    def access_log(self) -> dict[str, dict[str, Any]]:
        """nginx's log lines by request id."""
        [nginx] = self.containers("nginx")
        lines = [json.loads(line) for line in log(nginx) if line.startswith("{")]
        return {line["request_id"]: line for line in lines}

    def certificate(self) -> Path:
        """The certificate that clients must trust."""
        path = self.folder / "fullchain.pem"
        path.write_text(self.compose("exec", "-T", "nginx", "cat", "/etc/nginx/tls/fullchain.pem"))
        return path

    def last_log_lines(self) -> str:
        ids = docker("ps", "--all", "--quiet", "--filter", f"label={LABEL}={self.project}").split()
        return "\n".join(self._words_of(each) for each in ids)

    @staticmethod
    def _words_of(container: str) -> str:
        output = inspect(container)
        return "\n".join([f"{output['Name']} {output['State']['Status']}", *log(container)[-12:]])


def log(container: str) -> list[str]:
    """The lines of its stdout and stderr since it was created."""
    command = ["docker", "logs", container]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def inspect(container: str) -> dict[str, Any]:
    [output] = json.loads(docker("inspect", container))
    return dict(output)


def variables() -> dict[str, str]:
    """The variables of compose.yaml with their defaults."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", COMPOSE.read_text())
    found = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    found |= dict.fromkeys(re.findall(r"\$\{(\w+):\+[^}]*\}", text), "")  # flags that are left out by default
    assert len(re.findall(r"\$\{", text)) == len(re.findall(r"\$\{\w+:[-+][^}]*\}", text)), "a variable has no default"
    passed = [name for names in re.findall(r"x-pip: &pip \[(.*)\]", text) for name in names.split(", ")]
    passed += re.findall(r"(?m)^ +(?:- )?([A-Z_]+):? *$", text)
    return {**found, **dict.fromkeys(passed, "")}
