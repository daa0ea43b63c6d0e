from __future__ import annotations

from xgen_proxy.dialects.backend_request import PATHS
from xgen_proxy.dialects.registry import DIALECTS
from xgen_proxy.request.features import NEEDS
from xgen_proxy.request.opaque.endpoints import OPAQUE


def test_each_endpoint_has_a_path_and_a_capability_that_some_engine_has() -> None:
    assert len({endpoint.path for endpoint in OPAQUE.values()}) == len(OPAQUE)
    for name, endpoint in OPAQUE.items():
        assert PATHS[name] == endpoint.path
        assert endpoint.need in NEEDS
        assert any(endpoint.need in dialect.capabilities for dialect in DIALECTS.values())
        assert not (endpoint.form and endpoint.texts)
