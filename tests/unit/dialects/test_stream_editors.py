from __future__ import annotations

from typing import Any

import pytest

from tests.support.chunks import OPENAI, VLLM, Replica, delta, events, make_request, read


@pytest.mark.parametrize("dialect", [VLLM, OPENAI], ids=lambda dialect: dialect.name)
async def test_each_chunk_gets_the_public_model_name(dialect: Any) -> None:
    assert dialect.stream_editor(make_request(stream=True)) is None
    editor = dialect.stream_editor(make_request(stream=True, alias='pub"lic', served="m"))
    assert editor is not None
    assert not editor.done
    block = events(delta(content='said "model":"m"'), delta("stop"))
    edited = read(editor.edit(block))
    assert [chunk["model"] for chunk in edited] == ['pub"lic', 'pub"lic']
    assert edited[0]["choices"][0]["delta"]["content"] == 'said "model":"m"'
    assert await editor.finish(Replica().post) == b""
