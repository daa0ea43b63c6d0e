"""How far the model of a fallback may be from the model that it stands in for, as it was measured.

Backends may serve the same public name with different weights: bf16 on the GPU, a 4-bit GGUF on the CPU, or another
model altogether. `top1` is the share of positions at which two of them prefer the same next token, which
`xgen-proxy models compare --served` measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, model_validator
from pydantic_settings import NoDecode

from xgen_proxy.values import frozen

Pair = tuple[str, str, str]  # backend, backend, public model name

FORMAT = "xgen-proxy model distance 1"  # the command writes it, and nothing else is read
MAX_BYTES = 4 * 1024 * 1024


def read_distances(paths: Iterable[Path]) -> dict[Pair, float]:
    """The `top1` of each measured pair, in both directions. Raises ValueError, which names the file."""
    table: dict[Pair, float] = {}
    for path in paths:
        for (one, other, model), top1 in _read(path).items():
            table[one, other, model] = table[other, one, model] = top1
    return table


def _read(path: Path) -> dict[Pair, float]:
    again = "write it again with `xgen-proxy models compare --served … --json FILE`"
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_BYTES))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        return dict(_pair(each) for each in content["pairs"])
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} has no distances between models ({what}); {again}") from None


def _pair(pair: Mapping[str, Any]) -> tuple[Pair, float]:
    names = pair["reference"]["backend"], pair["other"]["backend"], pair["model"]
    top1 = pair["all"]["top1"]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("a name is empty or no text")
    if names[0] == names[1]:
        raise ValueError(f"both backends are called {names[0]}")
    if isinstance(top1, bool) or not isinstance(top1, int | float) or not 0 <= top1 <= 1:
        raise ValueError(f"top1 of {names[0]} and {names[1]} is not between 0 and 1")
    return names, float(top1)


@frozen
class Nearness:
    """The rule that decide() applies. `top1`: what was measured. `refuse`: whether a model that is too far is left out
    or only marked. `different`: pairs that are known to be different models, whose tokens cannot be compared."""

    min_top1: float | None
    refuse: bool
    top1: Mapping[Pair, float]
    different: frozenset[Pair] = frozenset()

    def judge(self, first: str, other: str, model: str) -> Judgement:
        """Of `other`, where it stands in for `first`."""
        pair = first, other, model
        top1, least = self.top1.get(pair), self.min_top1
        if pair in self.different:
            return Judgement(least is not None, "different model", f"it is a different model than {first}'s")
        if top1 is None:
            return Judgement(False, "" if least is None else "unknown")
        text = f"top1={top1:.4g}"
        if least is None or top1 >= least:
            return Judgement(False, text)
        why = f"its model is too far from {first}'s: top1 {top1:.4g} < fallback.min_top1 {least:g}"
        return Judgement(True, f"{text}; far", why)

    def is_unknown(self, first: str, other: str, model: str) -> bool:
        pair = first, other, model
        return self.min_top1 is not None and pair not in self.top1 and pair not in self.different


@frozen
class Judgement:
    """`far`: too far to stand in. `mark`: for the header, the log and /route; empty if there is nothing to say."""

    far: bool
    mark: str
    why: str = ""


def split_paths(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.lstrip().startswith("[") else [each.strip() for each in value.split(",") if each]


class Fallback(BaseModel, extra="forbid"):
    """How near the model of a fallback must be (routing rule 12)."""

    min_top1: float | None = Field(
        None,
        ge=0,
        le=1,
        description="A fallback must prefer the same next token as the reference (rule 12) at this share of positions,"
        " such as 0.95. Unset: any may take over. A pair that was not measured may take over and is marked `unknown`.",
    )
    far: Literal["refuse", "mark"] = Field(
        "refuse",
        description="What happens to a fallback below `min_top1`: it gets no request, or it answers with `far` in"
        " `X-Model-Distance`.",
    )
    distances: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(split_paths)] = Field(
        default=(),
        description="Files that `models compare --served` wrote, comma-separated. Read at the start, on a"
        " reload, and when one of them changes.",
    )
    _top1: dict[Pair, float] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _read(self) -> Fallback:
        self._top1 = read_distances(self.distances)
        return self

    @property
    def top1(self) -> Mapping[Pair, float]:
        return self._top1

    def nearness(self, different: frozenset[Pair] = frozenset()) -> Nearness | None:
        """None: there is nothing to decide or to say, so that requests pay nothing."""
        if self.min_top1 is None and not self._top1 and not different:
            return None
        return Nearness(self.min_top1, self.far == "refuse", self._top1, different)
