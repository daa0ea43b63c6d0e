"""Exit statuses: 1 for a model, 2 for the command itself."""

from __future__ import annotations

from xgen_proxy.models.errors import ModelError, ModelFileError, UsageError


def test_statuses() -> None:
    assert [error.status for error in (ModelError, ModelFileError, UsageError)] == [1, 1, 2]
