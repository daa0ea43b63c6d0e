"""For every test: settings of the person who runs the tests must not reach what is tested."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("XGEN_") and not name.startswith("XGEN_TEST_"):
            monkeypatch.delenv(name)
