"""Schemathesis makes requests from the document, right ones and wrong ones, and compares the answers with it.

https://schemathesis.readthedocs.io. The same requests in each run: a test must not fail for another change's author.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from xgen_proxy.api.description.document import document

schemathesis: Any = pytest.importorskip("schemathesis")
DESCRIBED = schemathesis.openapi.from_dict(document())
ours = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
