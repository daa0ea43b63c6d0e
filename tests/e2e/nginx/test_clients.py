"""Clients behind the certificate that `make up` makes: docs/clients.md has the variable by which each trusts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.clients.client import Place
from tests.e2e.clients.installed import NotInstalledError, install_node, install_python
from tests.e2e.clients.matrix import CLIENTS, backends
from tests.e2e.clients.scripted_model import QUESTION
from tests.e2e.nginx.conftest import StartNginx
from tests.support.documents import ROOT
from tests.support.nginx import Nginx
from tests.support.nginx_client import wait_ready
from tests.support.unavailable import unavailable

VARIABLES = {
    "openai (Python)": "SSL_CERT_FILE",
    "anthropic (Python)": "SSL_CERT_FILE",
    "openai (Node)": "NODE_EXTRA_CA_CERTS",
    "Claude Code": "NODE_EXTRA_CA_CERTS",
    "opencode": "NODE_EXTRA_CA_CERTS",
    "qwen-code": "NODE_EXTRA_CA_CERTS",
    "Codex": "CODEX_CA_CERTIFICATE",
}
PAGE = (ROOT / "docs" / "clients.md").read_text()


@pytest.fixture(scope="module")
def nginx(start_nginx: StartNginx) -> Iterator[Nginx]:
    """In front of a proxy with scripted engines."""
    with backends() as (proxy, _, _):
        yield wait_ready(start_nginx(proxy.port))


@pytest.mark.timeout(600)  # the first test installs
@pytest.mark.parametrize("name", VARIABLES)
def test_a_client_that_trusts_the_certificate(nginx: Nginx, name: str, tmp_path: Path) -> None:
    try:
        install_python()
        install_node()
    except NotInstalledError as error:
        unavailable(f"NOT TESTED WITH THE CLIENTS OF docs/clients.md: {error}")
    assert f"`{VARIABLES[name]}=xgen.pem`" in PAGE
    url = f"https://localhost:{nginx.tls}"
    place = Place(url, tmp_path / "work", tmp_path / "home", {VARIABLES[name]: str(nginx.certificate)})
    place.work.mkdir()
    place.home.mkdir()
    [client] = [each for each in CLIENTS if each.name == name]
    _, [seen] = client.run(place, [QUESTION])
    assert not seen.error
    assert "Paris" in seen.text


def launch(nginx: Nginx, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xgen_proxy.cli", "launch", "codex", "--url", f"https://localhost:{nginx.tls}"]
    inherited = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    return subprocess.run(command, env={**inherited, **variables}, capture_output=True, text=True, timeout=60)


def test_launch_trusts_the_certificate_that_it_is_told(nginx: Nginx) -> None:
    trusting = launch(nginx, SSL_CERT_FILE=str(nginx.certificate))
    assert trusting.returncode == 0, trusting.stderr
    assert f"https://localhost:{nginx.tls}/v1" in trusting.stdout
    doubting = launch(nginx)
    assert doubting.returncode == 1
    assert "CERTIFICATE_VERIFY_FAILED" in doubting.stderr
