"""For all tests: the user's settings must not affect them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import settings

from backends.models import default_model

settings.register_profile("ours", deadline=None)  # a busy machine must not fail a test
settings.load_profile("ours")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


LOOPBACK = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]  # containers often have no IPv6


@pytest.fixture(scope="session")
def gguf() -> str:
    """The default model, fetched if missing. XGEN_TEST_GGUF names another file."""
    return os.environ.get("XGEN_TEST_GGUF") or str(default_model())


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside() -> Iterator[None]:
    """Remove XGEN_… variables for the whole session, so that also proxies that serve a module start without them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("XGEN_") and not name.startswith("XGEN_TEST_"):
                patch.delenv(name)
        yield
