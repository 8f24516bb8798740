"""Watching: what a run looks like at a moment, from its archive, on any machine that sees the folder."""

from __future__ import annotations

import math
import sqlite3
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ...metrics_dsl.errors import SecateurError
from ...search.core.budget import Budget
from ..archive.archive import Archive
from ..archive.database import ArchiveError, BeginningError, is_left
from ..archive.front import best_of
from ..archive.run_folder import RunFolder
from ..summary.overview import Overview

RECENT = 300.0  # seconds that count as the last minutes
HERE = "this machine"  # the worker of a run that uses no cluster
State = Literal["beginning", "running", "holdout", "left", "ended"]


@dataclass(frozen=True)
class Look:
    """What a run looked like at one moment.

    Attributes:
        folder: The run folder; of several seeds the one that is being written.
        state: Whether it has measured anything yet, searches, measures on holdout tokens, has been left by
            the process that wrote it, or has ended.
        silence: Seconds since something was written; None before.
        overview: The run summed up; None before there is one.
        workers: One row a worker: measurements, how many of them lately, seconds of measuring, repeated
            (needed more than one attempt). None before there is an overview.
        lately: Seconds that "lately" reaches back; 0 at the first look.
        of_seeds: Text such as "seed 2 of 3", empty for a run of one.
    """

    folder: Path
    state: State
    silence: float | None = None
    overview: Overview | None = None
    workers: pd.DataFrame | None = None
    lately: float = 0.0
    of_seeds: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state in ("left", "ended")

    @property
    def rate(self) -> float | None:
        """Measurements per second lately, all workers together; None at the first look."""
        if self.workers is None or not self.lately:
            return None
        return float(self.workers["lately"].sum()) / self.lately

    @property
    def best(self) -> tuple[Any, Any]:
        """The best rows: of what was found, and of what is published."""
        if self.overview is None:
            return None, None
        decided = self.overview.decided
        new = best_of(decided[decided["baseline"].isna()], self.overview.objectives)
        return new, self.overview.best_published


class Watch:
    """Looks at a run again and again, and remembers how many measurements there were.

    Args:
        folder: A run folder, or one with runs of several seeds, of which the latest is looked at.

    Raises:
        ArchiveError: When the folder holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._seen: deque[tuple[float, Path, pd.Series]] = deque()
        self._seeds()

    def look(self) -> Look:
        """Read the archive once; it is not kept open, and who writes it is not held up.

        Raises:
            ArchiveError: When the folder holds no run any more, or one that this release cannot read.
        """
        seeds = self._seeds()
        begun = [path for path in seeds if RunFolder(path).has_archive]
        folder = max(begun, key=lambda path: _written(path) or 0.0, default=seeds[0])
        of_seeds = f"seed {seeds.index(folder) + 1} of {len(seeds)}" if folder != self.folder else ""
        try:
            with Archive(folder) as archive, archive.reading():
                overview = Overview(archive)
                has_ended = bool(archive.fact("has_ended"))
                rows = archive.rows(
                    "SELECT worker, count(*), sum(seconds), sum(attempts > 1) FROM measurements "
                    "GROUP BY worker ORDER BY worker"
                )
        except BeginningError:
            return Look(
                folder, "left" if is_left(RunFolder(folder).lock_file) else "beginning", of_seeds=of_seeds
            )
        except sqlite3.OperationalError:  # locked for long, where the file system knows no better
            return Look(folder, "running", of_seeds=of_seeds)
        workers = pd.DataFrame(rows, columns=["worker", "measurements", "seconds", "repeated"])
        workers["worker"] = workers["worker"].replace("", HERE)
        counts = workers.set_index("worker")["measurements"]
        before, lately = self._remember(folder, counts)
        workers["lately"] = (counts - before.reindex(counts.index, fill_value=0)).to_numpy()
        written = _written(folder)
        return Look(
            folder=folder,
            state=_state(overview, has_ended and all(map(_has_ended, seeds))),
            silence=None if written is None or not rows else max(0.0, time.time() - written),
            overview=overview,
            workers=workers,
            lately=lately,
            of_seeds=of_seeds,
        )

    def _seeds(self) -> list[Path]:
        return [run.path for run in RunFolder(self.folder).runs()]

    def _remember(self, folder: Path, counts: pd.Series) -> tuple[pd.Series, float]:
        """Keep counts; return those of the beginning of the last minutes, and how long ago that was."""
        now = time.monotonic()
        if self._seen and self._seen[0][1] != folder:
            self._seen.clear()  # the next seed
        self._seen.append((now, folder, counts))
        while now - self._seen[0][0] > RECENT and len(self._seen) > 2:
            self._seen.popleft()
        began, _, before = self._seen[0]
        return before, now - began


def _state(overview: Overview, has_ended: bool) -> State:
    if has_ended:
        return "ended"
    if is_left(RunFolder(overview.folder).lock_file):
        return "left"
    budget, spent = budget_of(overview)
    return "holdout" if budget is not None and spent >= budget.amount else "running"


def budget_of(overview: Overview) -> tuple[Budget | None, float]:
    """Return a run's budget, None where it is not known, and what is spent in its unit."""
    budget = Budget.parse(overview.settings["budget"]) if "budget" in overview.settings else None
    costs = overview.costs()[budget.unit if budget else "candidates"]
    return budget, float(costs.iloc[-1]) if len(costs) else 0.0


def standing(folder: str | Path, *, is_over: bool) -> dict[str, Any]:
    """Return how far a run is, in a few words; of several seeds the one that is being written.

    Args:
        folder: The run folder, which need not be there or be seen from here.
        is_over: Whether it goes on no more.

    Returns:
        ``progress`` (spent of the budget), ``best`` (least value of the first objective) and ``left``
        (seconds that measuring the rest will take at the pace so far, on as many workers); None for what is
        not known.
    """
    nothing = {"progress": None, "best": None, "left": None}
    try:
        look = Watch(folder).look()
    except (SecateurError, OSError, sqlite3.Error):
        return nothing
    overview, workers = look.overview, look.workers
    if overview is None or workers is None:
        return nothing
    budget, spent = budget_of(overview)
    of_budget = f"/{budget.amount:.0f} {budget.unit}" if budget else " candidates"
    first = overview.objectives[0]
    least = float(overview.decided[first].min())
    left = None
    if budget and spent and not is_over:
        pace = float(overview.costs()["seconds"].iloc[-1]) / spent / max(1, len(workers))
        left = max(0.0, budget.amount - spent) * pace
    return {
        "progress": f"{spent:.0f}{of_budget}{f', {look.of_seeds}' if look.of_seeds else ''}",
        "best": None if math.isnan(least) else f"{first} {least:.4g}",
        "left": left,
    }


def _written(folder: Path) -> float | None:
    """Return when the archive was last written, as the file system has it."""
    file = RunFolder(folder).archive_file
    paths = [file, file.with_name(f"{file.name}-wal")]
    try:  # a reader makes an empty second file
        return max(s.st_mtime for p in paths if p.is_file() and (s := p.stat()).st_size)
    except (ValueError, OSError):
        return None


def _has_ended(folder: Path) -> bool:
    try:
        with Archive(folder) as archive:
            return bool(archive.fact("has_ended"))
    except (ArchiveError, sqlite3.OperationalError):
        return False
