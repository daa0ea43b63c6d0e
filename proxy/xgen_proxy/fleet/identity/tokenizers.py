"""Compares the tokenizers of backends that serve the same public model name, when their replicas come up.

Engines do not say which weights they have. But two models of different families split a text into different tokens,
and a text of several languages, code and numbers is enough to tell. The same tokens do not prove the same weights:
`xgen-proxy models compare --served` measures how far apart they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from xgen_proxy.config.fallback import Pair
from xgen_proxy.errors import UpstreamError, UpstreamProtocolError
from xgen_proxy.fleet.admission import Admission
from xgen_proxy.fleet.backend import Backend, Fleet
from xgen_proxy.fleet.replica import Replica
from xgen_proxy.supervision import stop, supervise

log = logging.getLogger("xgen_proxy.health")

PROBE = "The quick brown fox and the lazy dog, 1234567890 €; 안녕하세요, 세계! 東京 naïve\n\tdef f(x): return x**2"
RETRY_S = 30.0  # llama-cpp-python answers once its running request is finished
TIMEOUT_S = 10.0

Tokens = tuple[int, ...]


class Tokenizers:
    """`pairs`: whether two backends split the probe alike; None while that is unknown."""

    def __init__(self, fleet: Fleet, admission: Admission) -> None:
        self.fleet = fleet
        self.admission = admission
        self.pairs: dict[Pair, bool | None] = {}
        self._tokens: dict[Replica, Tokens | None] = {}  # None: its engine cannot tell
        self._warned: set[tuple[str, Pair]] = set()
        self._task: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()

    def forget(self, replica: Replica) -> None:
        """It went down or came up: it may serve another model."""
        self._tokens.pop(replica, None)

    def check_soon(self) -> None:
        """Call when a replica came up, or serves other models, or the settings changed."""
        self._wanted.set()

    def start(self) -> None:
        self._task = supervise("tokenizers", self._run)

    async def stop(self) -> None:
        await stop(self._task)

    async def _run(self) -> None:
        failed = False
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S if failed else None):
                    await self._wanted.wait()
            self._wanted.clear()
            failed = await self._ask_all()
            self._compare()

    async def _ask_all(self) -> bool:
        """Returns whether some replica did not answer."""
        failed = False
        sharing = {backend: model for model, some in self._shared() for backend in some}
        for backend, model in sharing.items():
            for replica in backend.replicas:
                if replica.up and replica not in self._tokens:
                    try:
                        self._tokens[replica] = await self._ask(replica, backend.served(model))
                    except UpstreamError:
                        failed = True
        return failed

    async def _ask(self, replica: Replica, model: str) -> Tokens | None:
        """None if the replica cannot tell. One with several models is not asked, if the question would load one."""
        if replica.swaps_models:
            return None

        async def post(path: str, body: Any) -> tuple[int, Any]:
            status, answer = await replica.post_json(path, body, timeout_s=TIMEOUT_S)
            if status >= 500 and status != 501:
                raise UpstreamProtocolError(f"{path} returned {status}")
            return status, answer

        with self.admission.slot_for_check(replica):
            tokens = await replica.dialect.token_ids(model, PROBE, post)
        return None if tokens is None else tuple(tokens)

    def _shared(self) -> Iterator[tuple[str, list[Backend]]]:
        """The public names that several backends serve, and these, GPUs first."""
        backends = sorted(self.fleet.backends, key=lambda each: each.device_class != "gpu")
        for model in self.fleet.models:
            serving = [backend for backend in backends if model in backend.models]
            if len(serving) > 1:
                yield model, serving

    # what follows from the answers

    def _compare(self) -> None:
        listed = set(self.fleet.replicas)
        self._tokens = {replica: tokens for replica, tokens in self._tokens.items() if replica in listed}
        self.pairs = {
            (one.name, other.name, model): self._alike(one, other)
            for model, serving in self._shared()
            for one, other in itertools.combinations(serving, 2)
        }
        self.fleet.set_different({pair for pair, alike in self.pairs.items() if alike is False})
        for pair, alike in self.pairs.items():
            self._report(pair, alike)

    def _alike(self, one: Backend, other: Backend) -> bool | None:
        answers = [{t for each in backend.replicas if (t := self._tokens.get(each))} for backend in (one, other)]
        if not all(answers):
            return None
        return len(answers[0] | answers[1]) == 1

    def _report(self, pair: Pair, alike: bool | None) -> None:
        one, other, model = pair
        if alike is False:
            self._warn(
                "different", pair,
                f"{one} and {other} both serve {model}, but split a text into different tokens: they are different"
                " models. Answers will differ; give them different names, or let both serve the same model",
            )  # fmt: skip
        elif alike:
            self._warned.discard(("different", pair))
        nearness = self.fleet.nearness
        if nearness is not None and nearness.is_unknown(*pair):
            self._warn(
                "unmeasured", pair,
                f"fallback.min_top1 is set, but no file in fallback.distances measures {one} and {other} for {model}:"
                " they may stand in for each other, marked unknown",
            )  # fmt: skip

    def _warn(self, kind: str, pair: Pair, message: str) -> None:
        """Once, and again after it was right in between."""
        if (kind, pair) not in self._warned:
            self._warned.add((kind, pair))
            log.warning("%s", message)
