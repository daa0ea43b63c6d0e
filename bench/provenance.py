"""How a result file was measured: the calls that wrote it, each with its command, date, machine and versions."""

from __future__ import annotations

import datetime
from typing import Any

KEPT = ("command", "date", "machine", "versions")


def joined(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The conditions of a call that continues a file, with those of the earlier calls.

    Repetitions of a call on the same day are kept once. Old files have only the commands, as strings.
    """
    calls = [*before.get("earlier", []), *([{name: before[name] for name in KEPT}] if before else [])]
    distinct: list[Any] = []
    for call in reversed(calls):  # the last of those alike
        if not any(alike(call, each) for each in (now, *distinct)):
            distinct.insert(0, call)
    return {**now, "earlier": distinct}


def alike(call: Any, other: Any) -> bool:
    """Whether two calls differ in the time of day at most."""
    if isinstance(call, str) or isinstance(other, str):
        return bool(call == other)
    days = [str(each["date"])[:10] for each in (call, other)]
    return days[0] == days[1] and all(call[name] == other[name] for name in ("command", "machine", "versions"))


def earlier(conditions: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls before the last. Of some only the command is known."""
    return [{"command": call} if isinstance(call, str) else call for call in conditions.get("earlier", [])]


def provenance(found: dict[str, Any]) -> str:
    """When, where, by which commands and with which versions: the line below the table of a result file."""
    before = earlier(found)
    sentences = [f"Measured {measured(found)}."]
    sentences += [f"Earlier, into the same file: {measured(call)}." for call in before if "date" in call]
    if unknown := [f"`{call['command']}`" for call in before if "date" not in call]:
        sentences.append(f"Before that, without a record of date and machine, by {', '.join(unknown)}.")
    return " ".join(sentences) + "\n"


def measured(call: dict[str, Any]) -> str:
    where = call["machine"]
    parts = [
        where["cpu"],
        *(f"{count} x {gpu}" if count > 1 else gpu for gpu, count in counted(where["gpus"])),
        f"{where['cores']} cores",
        f"{where['memory_bytes'] / 2**30:.0f} GiB",
    ]
    versions = ", ".join(f"{package} {version}" for package, version in call["versions"].items())
    day = datetime.datetime.fromisoformat(call["date"]).date()
    return f"on {day} on {', '.join(parts)}, by `{call['command']}`; {versions}"


def counted(names: list[str]) -> list[tuple[str, int]]:
    return [(name, names.count(name)) for name in dict.fromkeys(names)]
