"""The settings of aliases: names that clients ask for, and the models that they stand for.

Coding agents ask for the models of their maker, whatever serves them: Claude Code for `claude-haiku-…` where a small
model will do and for `claude-opus-…` where only the best will. So a name says what kind of work comes, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, model_validator

from xgen_proxy.request.features import DeviceClass, Urgency, UsedAlias
from xgen_proxy.request.fields import NAME_LENGTH

MOST = 64  # aliases; the patterns are tried one after another
PATTERN = re.compile(r"[!-~]{1,128}")  # printable ASCII, since it stands in a header


def check_pattern(pattern: str) -> str:
    if not PATTERN.fullmatch(pattern):
        raise ValueError("an alias has 1 to 128 characters of ASCII without spaces; * stands for any text")
    return pattern


class Alias(BaseModel, extra="forbid"):
    """What a name stands for. Where nothing but the model is set, the model's name alone will do."""

    model: str = Field(min_length=1, max_length=NAME_LENGTH, description="The public name of a model that is served.")
    route: DeviceClass | None = Field(
        None,
        description="`cpu`: the CPU comes first, and the GPU if it is full. `gpu`: the GPU, also if it is full. Unset:"
        " the rules of routing.",
    )
    urgency: Urgency | None = Field(None, description="Of requests that do not say theirs: `high`, `normal` or `low`.")

    @model_validator(mode="before")
    @classmethod
    def _only_a_model(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class Models(BaseModel, extra="forbid"):
    """Names of models beside those that the backends serve."""

    aliases: dict[Annotated[str, AfterValidator(check_pattern)], Alias] = Field(
        default_factory=dict,
        max_length=MOST,
        description='Names that clients may ask for → the model that they get, such as `{"gpt-4o": "chat"}`. `*` stands'
        " for any text.",
    )
    _patterns: list[tuple[str, Callable[[str], object]]] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _in_order(self) -> Models:
        """The most specific pattern first: that with the most characters besides `*`."""
        for name, alias in self.aliases.items():
            if alias.model != name and alias.model in self.aliases:
                raise ValueError(f"{name!r} stands for {alias.model!r}, which is an alias too; name the model itself")
        patterns = sorted((name for name in self.aliases if "*" in name), key=lambda name: (-len(_literal(name)), name))
        self._patterns = [(name, re.compile(_expression(name)).match) for name in patterns]
        return self

    def find(self, name: str, is_served: Callable[[str], bool]) -> UsedAlias | None:
        """The alias of that name, else the most specific pattern, but none that would hide a model that is served."""
        if name in self.aliases:
            return self._used(name, name)
        if self._patterns and not is_served(name):
            for pattern, match in self._patterns:
                if match(name):
                    return self._used(name, pattern)
        return None

    def _used(self, asked: str, pattern: str) -> UsedAlias:
        alias = self.aliases[pattern]
        return UsedAlias(asked, pattern, alias.model, alias.route, alias.urgency)

    def names(self) -> dict[str, str]:
        """Names that a client may choose from a list → the models that they stand for. A pattern has an example: Claude
        Code lists only names that begin with `claude` or `anthropic`, so `claude-*` is `claude-xgen-MODEL`."""
        listed: dict[str, str] = {}
        for pattern, alias in self.aliases.items():
            name = _example(pattern, alias.model) if "*" in pattern else pattern
            found = self.find(name, lambda _: False) if name else None
            if found is not None and found.model == alias.model:  # else another pattern is more specific
                listed[name] = alias.model
        return listed


def _literal(pattern: str) -> str:
    return pattern.replace("*", "")


def _expression(pattern: str) -> str:
    """Of the special characters of fnmatch only `*` is special here. Its expressions need no backtracking."""
    return translate(re.sub(r"[?\[]", r"[\g<0>]", pattern))


def _example(pattern: str, model: str) -> str:
    """Empty for `*` alone. A `/` in a name does not work in Claude Code."""
    before, _, after = pattern.rpartition("*")
    before = _literal(before)
    hyphen = "-" if before[-1:].isalnum() else ""
    return f"{before}{hyphen}xgen-{model.replace('/', '-')}{after}" if _literal(pattern) else ""
