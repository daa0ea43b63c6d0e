"""Real clients do real tasks through the proxy, and can do what docs/clients.md says that they can."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.clients.client import Client
from tests.e2e.clients.installed import NotInstalledError, install_node, install_python
from tests.e2e.clients.matrix import CLIENTS, COLUMNS, YES, recorded, row
from tests.support.unavailable import unavailable

RECORDED = {each["client"]: each for each in recorded()}


@pytest.fixture(scope="module", autouse=True)
def clients() -> None:
    try:
        install_python()
        install_node()
    except NotInstalledError as error:
        unavailable(f"NOT TESTED WITH THE CLIENTS OF docs/clients.md: {error}")


@pytest.mark.timeout(600)  # the first test installs
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_client(client: Client, tmp_path: Path) -> None:
    found = row(client, tmp_path)
    done = {column: found[column] == YES for column in COLUMNS}
    told = {column: RECORDED[client.name][column] == YES for column in COLUMNS}
    assert done == told, f"docs/clients.md says otherwise: run python -m tests.e2e.clients\n{found}"
    assert found["version"] == RECORDED[client.name]["version"]
