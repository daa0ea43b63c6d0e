"""The wheel contains the proxy and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.documents import ROOT
from xgen_proxy import __version__


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of a wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_installs_one_package(names: list[str]) -> None:
    """A top-level `proxy`, `tests` or `backends` would collide with other distributions."""
    assert {name.partition("/")[0] for name in names} == {"xgen_proxy", f"xgen_proxy-{__version__}.dist-info"}


def test_the_wheel_has_every_module(names: list[str]) -> None:
    folder = ROOT / "proxy"
    modules = {str(path.relative_to(folder)) for path in Path(folder / "xgen_proxy").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_is_typed(names: list[str]) -> None:
    assert "xgen_proxy/py.typed" in names
