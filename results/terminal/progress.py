"""The progress line of a run: a live line on a terminal, one line a batch elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...metrics_dsl.printable import one_line
from ...search.core.budget import Budget
from ...search.core.candidate import Stage, Trial
from ..archive.archive import Archive

SILENCE = 30.0  # seconds without a line, off a terminal


class Progress:
    """Says how far a run is and how good its best candidate.

    Off a terminal a line with the time appears at least every half minute, whatever takes long.

    Args:
        report: Prints a sentence.
        silence: Seconds after which a line appears off a terminal.
    """

    def __init__(self, report: Callable[[str], None], silence: float = SILENCE) -> None:
        self._report = report
        self._silence = silence
        self._text = ""
        self._now = "starting"
        self._status: Any = None
        self._told = time.monotonic()
        self._ended = threading.Event()
        self._lock = threading.Lock()  # lines come from two threads
        self._teller: threading.Thread | None = None
        self.begin(Budget(1))
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        else:
            self._teller = threading.Thread(target=self._keep_telling, name="progress", daemon=True)
            self._teller.start()

    def begin(self, budget: Budget) -> None:
        """Begin to count for a run of some budget."""
        self._budget = budget
        self._start = time.monotonic()
        self._is_replay = True
        self._spent = self._replayed = 0.0
        self._known = 0

    def report(self, text: str) -> None:
        """Show a step of the run."""
        self._now = text
        if self._status is None:
            self._print(text)
        else:
            self._show(text)

    def _show(self, text: str) -> None:
        from rich.text import Text

        self._status.update(Text(one_line(text)))  # not markup: what is in brackets would be lost

    def _print(self, text: str) -> None:
        with self._lock:
            self._told = time.monotonic()
            self._report(text)

    def _keep_telling(self) -> None:
        """Print where the run is, with the time, whenever nothing has been printed for a while."""
        while not self._ended.wait(max(0.01, self._told + self._silence - time.monotonic())):
            if time.monotonic() - self._told >= self._silence:
                self._print(f"{time.strftime('%H:%M:%S')}  {self._now}")

    def step(self, stage: Stage, done: int, total: int) -> None:
        """Show how far a batch is, on a terminal; called for what is measured, not for what is replayed."""
        self._is_replay = False
        self._now = f"{self._text}  [{stage} {done}/{total}]".strip()
        if self._status is not None:
            self._show(self._now)

    def batch(self, archive: Archive, trials: Sequence[Trial]) -> None:
        """Show the state of the run after a batch."""
        counts = archive.counts()
        self._spent += self._budget.cost(trials)
        done = counts.candidates
        if self._is_replay:
            self._start, self._replayed, self._known = time.monotonic(), self._spent, done
        self._known = min(self._known, done)  # a batch that a larger budget makes whole is told anew
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
            self.report(self._text)

    def _amount(self, done: int) -> str:
        budget = self._budget
        if budget.unit == "candidates":
            return f"{done}/{budget.amount:.0f} candidates"
        return f"{self._spent:,.0f}/{budget.amount:,.0f} {budget.unit}  {done} candidates"

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._ended.set()
        if self._teller is not None:
            self._teller.join()
            self._teller = None
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
