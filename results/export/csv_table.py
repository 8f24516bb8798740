"""A run as PySR's hall of fame: the best metric of each size, in the columns its readers know."""

from __future__ import annotations

import csv
from pathlib import Path

from ..archive.archive import Archive
from .candidate_record import ExportError


def write_csv(archive: Archive, path: Path) -> None:
    """Write ``Complexity,Loss,Equation``: nodes, the run's first objective that is no size, the metric.

    Raises:
        ExportError: When the run has no measured candidate.
    """
    objectives = [name for name in archive.fact("objectives", ["kl"]) if name != "size"] or ["layer_error"]
    rows = archive.frame()
    rows = rows[rows["status"].isin(["measured", "alias"]) & rows[objectives[0]].notna()]
    if rows.empty:
        raise ExportError(
            f"no candidate of {archive.folder} has {objectives[0]} yet: there is nothing to write"
        )
    best = rows.sort_values(objectives[0], kind="stable").drop_duplicates("size").sort_values("size")
    # A metric's text has names, numbers and operators alone: a spreadsheet may
    # compute one that begins with a sign, but it can neither run nor fetch anything.
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Complexity", "Loss", "Equation"])
        for size, loss, metric in zip(best["size"], best[objectives[0]], best["metric"], strict=True):
            writer.writerow([int(size), repr(float(loss)), metric])
