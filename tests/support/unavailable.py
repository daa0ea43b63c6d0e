"""Skip a test whose tools are missing, except in CI, where every test must run."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def unavailable(reason: str) -> NoReturn:
    """Skip the test on a developer's machine; fail it in CI."""
    if IN_CI:
        pytest.fail(f"{reason} (CI must run this)")
    pytest.skip(reason)
