"""What a search starts from: metrics by text, from candidates' files and from earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..metrics_dsl.expression import Expression
from ..metrics_dsl.parser import parse
from ..results.archive.archive import Archive
from ..results.archive.run_folder import RunFolder
from ..results.export.rule_source import read_rule
from ..search.toml import SettingsError


def starting_points(sources: Sequence[str], run: Path) -> list[Expression]:
    """Return the metrics to start from, each once.

    A run begins with those that it noted when it was begun: what it started from may have gone on since.

    Args:
        sources: Metrics, names of published ones, ``FILE.json``, ``RUN:KEY``, or run folders, which stand for
            their fronts.
        run: The run folder that is searched into.

    Raises:
        SecateurError: For a source that is none of these, or a run without a front.
    """
    if not sources:
        return []
    if RunFolder(run).has_archive:
        with Archive(run) as archive:
            noted = archive.fact("starts")
        if noted is not None:
            return [parse(text) for text in noted]
    found: list[Expression] = []
    for source in sources:
        folder = RunFolder(Path(source).expanduser())
        if folder.is_run or folder.seeds:
            found += _front(folder)
        else:
            found.append(read_rule(source).metric)
    return list(dict.fromkeys(found))


def _front(folder: RunFolder) -> list[Expression]:
    metrics: list[Expression] = []
    for run in folder.runs():
        with Archive(run.path) as archive:
            metrics += [archive.metric(text) for text in archive.front()["metric"]]
    if not metrics:
        raise SettingsError(f"expected a run with a front to start from, got {folder.path} without one yet")
    return metrics
