"""The table of prices that the user edits: what each machine costs per hour, rented or owned."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

from xgen_proxy.costs.errors import CostError
from xgen_proxy.values import frozen

HOURS_PER_YEAR = 24 * 365
RENTED = ("per_hour",)
OWNED = ("purchase", "years", "power_watts", "idle_watts", "per_kwh")
TEXTS = ("what", "source", "date")
OPTIONAL = ("upkeep_per_hour", "replicas")

TEMPLATE = """\
# Prices for `xgen-proxy cost`. The numbers below are examples and no offer of anyone: replace them with what you pay.
#
# One table for each machine. Its name is what you write before a file of measurements:
#     xgen-proxy cost --prices prices.toml gpu=vllm.json cpu=llama.json
# For a running proxy (--url), a replica's machine is the table with its backend's name, else the one with its device
# class, gpu or cpu.

currency = "$"  # a label; nothing is converted

[machines.gpu]  # rented
what = "a rented server with one GPU"
per_hour = 2.50        # while it is on, busy or not
source = "an example"  # where the price is from: the offer, the invoice
date = "2026-11-26"    # when you looked

[machines.cpu]  # owned
what = "a server of our own with 16 cores"
purchase = 4000        # what it cost
years = 4              # in which it is written off
power_watts = 250      # at full use, measured at the socket
idle_watts = 80        # when it is on and idle
per_kwh = 0.30         # price of electricity
upkeep_per_hour = 0.0  # rack, network, repairs
replicas = 1           # how many replicas of a backend run on one such machine (--url only)
source = "an example"
date = "2026-11-26"
"""


@frozen
class Machine:
    """`fixed`: per hour, because it is on. `extra`: per hour, what it costs more at full use."""

    name: str
    what: str
    fixed: float
    extra: float
    replicas: int
    source: str
    date: str

    def per_hour(self, utilisation: float) -> float:
        return self.fixed + self.extra * utilisation


@frozen
class Prices:
    currency: str
    machines: tuple[Machine, ...]

    def machine(self, *names: str) -> Machine:
        """The first of these names that the table has. Raises CostError."""
        found = {machine.name: machine for machine in self.machines}
        for name in names:
            if name in found:
                return found[name]
        raise CostError(
            f"the prices have no machine named {' or '.join(dict.fromkeys(names))}, only {', '.join(found)}; "
            f"add a table [machines.{names[0]}]"
        )


def write_template(path: Path) -> None:
    """Raises CostError."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise CostError(f"{path} exists already and is not overwritten; choose another name or remove it") from None
    except OSError as error:
        raise CostError(f"cannot write {path}: {error.strerror}") from None


def read_prices(path: Path) -> Prices:
    """Raises CostError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CostError(f"there is no {path}; `xgen-proxy cost --write-prices {path}` writes one to edit") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CostError(f"cannot read {path}: {error}") from None
    machines = table.get("machines")
    if not isinstance(machines, dict) or not machines:
        raise CostError(f"{path} has no [machines.NAME]; `xgen-proxy cost --write-prices FILE` writes an example")
    currency = table.get("currency", "$")
    return Prices(
        currency if isinstance(currency, str) else "$",
        tuple(machine(f"{path}: machines.{name}", name, entry) for name, entry in machines.items()),
    )


def machine(where: str, name: str, entry: Any) -> Machine:
    """Raises CostError."""
    if not isinstance(entry, dict):
        raise CostError(f"{where} is not a table")
    if unknown := set(entry) - {*RENTED, *OWNED, *TEXTS, *OPTIONAL}:
        raise CostError(
            f"{where} has the unknown key {min(unknown)}; known are {', '.join((*RENTED, *OWNED, *OPTIONAL, *TEXTS))}"
        )
    if ("per_hour" in entry) == any(key in entry for key in OWNED):
        raise CostError(f"{where} needs either per_hour (rented) or {', '.join(OWNED)} (owned)")
    upkeep = number(where, entry, "upkeep_per_hour", 0.0)
    if "per_hour" in entry:
        fixed, extra = number(where, entry, "per_hour"), 0.0
    else:
        fixed, extra = owned(where, entry)
    if fixed + upkeep + extra == 0:
        raise CostError(f"{where} costs nothing; give its price, or its share of what you pay")
    replicas = number(where, entry, "replicas", 1.0)
    if replicas < 1 or replicas % 1:
        raise CostError(f"{where}.replicas is {replicas:g}; it must be a whole number, 1 or more")
    texts = {key: str(entry.get(key, "")) for key in TEXTS}
    return Machine(name=name, fixed=fixed + upkeep, extra=extra, replicas=int(replicas), **texts)


def owned(where: str, entry: dict[str, Any]) -> tuple[float, float]:
    """Per hour: idle, and what full use adds. Raises CostError."""
    purchase, years, full, idle, per_kwh = (number(where, entry, key) for key in OWNED)
    if not years:
        raise CostError(f"{where}.years is 0; give the years in which the machine is written off")
    if full < idle:
        raise CostError(f"{where}.power_watts is less than idle_watts; it is the power at full use")
    return purchase / (years * HOURS_PER_YEAR) + idle / 1000 * per_kwh, (full - idle) / 1000 * per_kwh


def number(where: str, entry: dict[str, Any], key: str, default: float | None = None) -> float:
    """Raises CostError unless it is a number, 0 or more."""
    value = entry.get(key, default)
    if value is None:
        raise CostError(f"{where} lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise CostError(f"{where}.{key} is {value!r}; it must be a number, 0 or more")
    return float(value)
