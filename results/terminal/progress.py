"""The progress line of a run: a live line on a terminal, one line a batch elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...search.core.budget import Budget
from ...search.core.candidate import Stage, Trial
from ..archive.archive import Archive


class Progress:
    """Says how far a run is and how good its best candidate.

    Args:
        report: Prints a sentence.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._text = ""
        self._status: Any = None
        self.begin(Budget(1))
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()

    def begin(self, budget: Budget) -> None:
        """Begin to count for a run of some budget."""
        self._budget = budget
        self._start = time.monotonic()
        self._is_replay = True
        self._spent = self._replayed = 0.0
        self._known = 0

    def line(self, text: str) -> None:
        """Show a step of the run."""
        if self._status is None:
            self._report(text)
        else:
            self._status.update(text)

    def step(self, stage: Stage, done: int, total: int) -> None:
        """Show how far a batch is, on a terminal; called for what is measured, not for what is replayed."""
        self._is_replay = False
        if self._status is not None:
            self._status.update(f"{self._text}  [{stage} {done}/{total}]".strip())

    def batch(self, archive: Archive, trials: Sequence[Trial]) -> None:
        """Show the state of the run after a batch."""
        counts = archive.counts()
        self._spent += self._budget.cost(trials)
        done = counts.candidates
        if self._is_replay:
            self._start, self._replayed, self._known = time.monotonic(), self._spent, done
        seconds = time.monotonic() - self._start
        rate = (self._spent - self._replayed) / seconds if seconds else 0.0
        left = duration((self._budget.amount - self._spent) / rate) if rate else "?"
        front = archive.front()
        first = front.attrs["objectives"][0]
        best = f"best {first} {front[first].min():.4g}" if len(front) else "nothing measured"
        self._text = (
            f"{self._amount(done)}  {best}  front {len(front)}  "
            f"{(done - self._known) / seconds if seconds else 0.0:.3g}/s  left {left}  {counts}"
        )
        if not self._is_replay:  # what an earlier session measured was told then
            self.line(self._text)

    def _amount(self, done: int) -> str:
        budget = self._budget
        if budget.unit == "candidates":
            return f"{done}/{budget.amount:.0f} candidates"
        return f"{self._spent:,.0f}/{budget.amount:,.0f} {budget.unit}  {done} candidates"

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._status is not None:
            self._status.stop()
            if self._text:
                self._report(self._text)
            self._status = None


def duration(seconds: float) -> str:
    """Return a time for people, such as ``42s``, ``3m07s`` or ``2h05m``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
