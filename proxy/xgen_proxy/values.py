"""@frozen: a dataclass that type checkers keep frozen.

`frozen=True` would keep it frozen at runtime too, and make constructing one five times as slow; a NamedTuple takes half
as long again to construct and three times as long to read. A request constructs some fifteen of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def frozen(cls: type[T]) -> type[T]:
    """Use dataclasses.replace() to get a changed copy."""
    return dataclass(slots=True, unsafe_hash=True)(cls)
