"""A progress bar on standard error, on terminals only."""

from __future__ import annotations

import sys
import time

WIDTH = 30
EVERY_S = 0.1


class Progress:
    """`total`: in the unit of `update`; None while it is unknown. `unit`: bytes are shown as MB."""

    def __init__(self, what: str, total: int | None, unit: str = "bytes") -> None:
        self.what, self.total, self.unit = what, total, unit
        self._began = time.monotonic()
        self._drawn = -EVERY_S
        self._shown = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        """Draw it, ten times a second at most."""
        now = time.monotonic() - self._began
        if not self._shown or (now - self._drawn < EVERY_S and done != self.total):
            return
        self._drawn = now
        print(f"\r\033[K{self._line(done, now)}  {note}"[:160], end="", file=sys.stderr, flush=True)

    def _line(self, done: int, seconds: float) -> str:
        amount = f"{done / 1e6:.1f} MB" if self.unit == "bytes" else f"{done} {self.unit}"
        if not self.total:
            return f"{self.what}  {amount}"
        share = min(1.0, done / self.total)
        bar = "#" * int(WIDTH * share)
        left = f", {seconds / share - seconds:.0f} s left" if 0.02 < share < 1 and seconds > 1 else ""
        return f"{self.what} [{bar.ljust(WIDTH, '.')}] {share:4.0%}  {amount}{left}"

    def end(self, line: str = "") -> None:
        """Remove the bar, and print `line` if there is one."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr)
        if line:
            say(line)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
