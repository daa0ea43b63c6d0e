"""For every test: settings of the person who runs the tests must not reach what is tested."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside() -> Iterator[None]:
    """For the whole session, so that proxies which serve a whole module are started without them too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("XGEN_") and not name.startswith("XGEN_TEST_"):
                patch.delenv(name)
        yield
