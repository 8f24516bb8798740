"""A run as an Optuna study in a journal file, which optuna-dashboard opens.

A journal takes a twentieth of the time of Optuna's SQLite storage, which is minutes for thousands of trials.
Values are the run's objectives. A metric is no parameter of Optuna's, so trials have none: what a candidate
is stands in its user attributes.
"""

from __future__ import annotations

import datetime
import statistics
import warnings
from pathlib import Path
from typing import Any

from ...search.core.candidate import Trial
from ...search.core.objectives import look_up_objectives, point
from ..archive.archive import Archive
from .candidate_record import FIGURES


def write_optuna(archive: Archive, path: Path) -> None:
    """Write all candidates in the order told; rejected ones as pruned, failed ones as failed."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    objectives = look_up_objectives(archive.fact("objectives", ["kl", "size"]))
    with archive.reading():  # a run may be written meanwhile
        rows = {row["key"]: row for row in archive.frame().to_dict("records")}
        told = archive.trials()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = JournalFileBackend(str(path))
    try:
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(journal),
            study_name=archive.folder.absolute().name,
            directions=["minimize"] * len(objectives),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.name for objective in objectives])
        for name in ("pattern", "calibration", "versions"):
            study.set_user_attr(name, archive.fact(name))
        start = datetime.datetime(2000, 1, 1)  # the archive knows how long measuring took, not when
        trials = []
        for trial in told:
            values = point(trial, objectives)
            row = rows[trial.candidate.key]
            figures = {n: float(row[n]) for n in FIGURES if row[n] == row[n]}
            attributes = {**_attributes(trial), **figures}
            if isinstance(row["baseline"], str):
                attributes["published_as"] = row["baseline"]
            state = {
                "failed": optuna.trial.TrialState.FAIL,
                "rejected": optuna.trial.TrialState.PRUNED,
            }.get(trial.status, optuna.trial.TrialState.COMPLETE)
            if state == optuna.trial.TrialState.COMPLETE and values is None:
                state = optuna.trial.TrialState.PRUNED  # measured, but not on what the run minimises
            is_complete = state == optuna.trial.TrialState.COMPLETE
            made = optuna.trial.create_trial(
                state=state, values=list(values) if is_complete and values else None, user_attrs=attributes
            )
            end = start + datetime.timedelta(seconds=trial.measurement.seconds)
            made.datetime_start, made.datetime_complete, start = start, end, end
            trials.append(made)
        study.add_trials(trials)
    finally:
        optuna.logging.set_verbosity(before)


def _attributes(trial: Trial) -> dict[str, Any]:
    candidate = trial.candidate
    found: dict[str, Any] = {
        "metric": str(candidate.metric),
        "key": candidate.key,
        "status": trial.status,
        "stage": trial.measurement.stage,
        "group": candidate.group,
        "size": candidate.metric.size,
    }
    if candidate.ratios:
        found["ratios"] = (
            f"{min(candidate.ratios):.1%} to {max(candidate.ratios):.1%}, "
            f"mean {statistics.fmean(candidate.ratios):.1%}, of {len(candidate.ratios)} layers"
        )
    if trial.alias_of:
        found["alias_of"] = trial.alias_of
    if trial.measurement.failure:
        found["failure"] = trial.measurement.failure
    return found
