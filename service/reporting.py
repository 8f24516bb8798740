"""Showing runs: reports, pictures, snapshots and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..results.archive.archive import Archive
from ..results.archive.database import ArchiveError
from ..results.archive.run_folder import HasFolder, folder_of

if TYPE_CHECKING:
    import pandas


def report(run: str | Path | HasFolder, path: str | Path, *, force: bool = False) -> Path:
    """Write a run's report: one HTML file that opens offline, also while the run goes on.

    An earlier report gives way, with ``force`` any file that is of no run or calibration.

    Raises:
        SecateurError: When there is no run, or the path cannot become a file.
    """
    from ..results.report.report import write_report

    with Archive(folder_of(run)) as archive:
        return write_report(archive, path, force=force)


def plot(run: str | Path | HasFolder, path: str | Path, kind: str = "front", *, force: bool = False) -> Path:
    """Write one picture of a run, ``front``, ``history`` or ``ratios``, as SVG, PNG or PDF.

    An earlier picture gives way, with ``force`` any file that is of no run or calibration.

    Raises:
        SecateurError: For an unknown kind or suffix, or when the run has nothing to draw yet.
    """
    from ..results.report.plot import write_plot

    with Archive(folder_of(run)) as archive:
        return write_plot(archive, kind, path, force=force)


def snapshot(run: str | Path | HasFolder, path: str | Path, *, force: bool = False) -> Path:
    """Write a run's candidates as one Parquet file, also while it runs.

    An earlier snapshot gives way, with ``force`` any file that is of no run or calibration.

    Raises:
        SecateurError: When there is no run, or the path is a folder.
    """
    from ..results.archive.snapshot import snapshot as write

    with Archive(folder_of(run)) as archive:
        return write(archive, path, force=force)


def compare(*runs: str | Path | HasFolder | Sequence[str | Path | HasFolder]) -> pandas.DataFrame:
    """Compare runs on one calibration: one row a configuration, the best first.

    A folder of seeds stands for all of its runs. ``attrs["verdicts"]`` has a sentence on each.

    Raises:
        ArchiveError: When one is no run, or they were measured on different calibrations or minimise
            different things.
    """
    from ..results.summary.compare import compare as rows_of
    from ..results.summary.compare import open_runs, verdicts

    wanted: list[str | Path | HasFolder] = []
    for run in runs:  # each, or a list of them
        wanted += run if isinstance(run, Sequence) and not isinstance(run, str) else [run]
    if not wanted:
        raise ArchiveError("expected run folders to compare, got none")
    opened = open_runs([folder_of(run) for run in wanted])
    try:
        found = rows_of(opened)
    finally:
        for archive in opened:
            archive.close()
    found.attrs["verdicts"] = verdicts(found)
    return found
