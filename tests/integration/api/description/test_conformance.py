"""Schemathesis makes requests from the document, right ones and wrong ones, and compares the answers with it.

https://schemathesis.readthedocs.io. The same requests in each run: a test must not fail for another change's author.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from tests.support.fake_upstream import FakeUpstream, Talk, good
from tests.support.running_proxy import RunningProxy, backend, running_proxy
from xgen_proxy.api.description.document import document

EXAMPLES = 5  # for each operation, beside those that the limits of its schema give
KEPT = (
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


@pytest.fixture(scope="module")
def proxy() -> Iterator[RunningProxy]:
    gpu, cpu = FakeUpstream(default=engine), FakeUpstream(default=engine)
    backends = {"vllm": backend(gpu), "llama_cpp": backend(cpu, device_class="cpu", embeddings=True)}
    with running_proxy(backends=backends) as running:
        yield running
    gpu.close()
    cpu.close()


async def engine(talk: Talk) -> None:
    """Answers whatever is asked."""
    if talk.path == "/v1/embeddings":
        vectors = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        await talk.answer(200, {"object": "list", "model": "m", "data": vectors, "usage": {"prompt_tokens": 1}})
    elif talk.path == "/v1/completions":
        choice = {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
        whole = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
        if talk.json.get("stream"):
            await talk.start_stream()
            await talk.event(whole)
            await talk.end()
        else:
            await talk.answer(200, whole)
    elif talk.path == "/v1/chat/completions":
        await good(talk)
    else:
        await talk.answer(200, {"model": "m"})


each_operation: Callable[[Any], Any] = schemathesis.openapi.from_dict(document()).parametrize()


@each_operation
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case: Any, proxy: RunningProxy) -> None:
    checks = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in KEPT]
    assert len(checks) == len(KEPT)
    if case.operation.path.startswith("/generate"):  # which takes "5" for 5 and "true" for true
        checks = [check for check in checks if check.__name__ != "negative_data_rejection"]
    response = case.call(base_url=proxy.url)
    case.validate_response(response, checks=checks)
    assert response.status_code < 500
