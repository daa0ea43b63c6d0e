from __future__ import annotations

import pytest

from xgen_proxy.downstream.request_id import request_id


@pytest.mark.parametrize("given", [b"a", b"A.b-c_9", b"x" * 128])
def test_safe_id_is_kept(given: bytes) -> None:
    assert request_id({b"x-request-id": given}) == given.decode()


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"a\tb", b"a\n", b"<script>", "é".encode(), b"\xff"])
def test_any_other_id_is_replaced(given: bytes) -> None:
    ids = {request_id({b"x-request-id": given}) for _ in range(2)}
    assert len(ids) == 2
    assert all(id.startswith("req-") for id in ids)


def test_new_id_without_a_header() -> None:
    assert request_id({}) != request_id({})
