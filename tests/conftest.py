"""For every test: settings of the person who runs the tests must not reach what is tested."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("ours", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("ours")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


LOOPBACK = ["127.0.0.1", "::1"] if has_ipv6() else ["127.0.0.1"]  # containers often have no IPv6


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside() -> Iterator[None]:
    """For the whole session, so that proxies which serve a whole module are started without them too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("XGEN_") and not name.startswith("XGEN_TEST_"):
                patch.delenv(name)
        yield
