from __future__ import annotations

from tests.support.chunks import OPENAI, Replica, make_request
from xgen_proxy.request.features import NEEDS


def test_any_server_is_assumed_to_do_everything_and_to_resume_nothing() -> None:
    assert OPENAI.capabilities == NEEDS
    assert not OPENAI.can_resume(make_request("completions").features, None)


async def test_any_server_is_asked_for_no_tokens() -> None:
    assert await OPENAI.count_tokens(make_request(), "abc", Replica().post) is None
