"""Objectives that others have added to a run: worked out from its trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...metrics_dsl.errors import SecateurError
from ...search.core.objectives import OBJECTIVES, Objective, look_up
from .database import explained

if TYPE_CHECKING:
    from .store import Store


def look_up_of_run(store: Store, name: str) -> Objective:
    """Return an objective of a run.

    Raises:
        SecateurError: For an unknown one; it says which plugin the run needs.
    """
    try:
        return look_up(OBJECTIVES, name, "an objective")
    except SecateurError as error:
        raise explained(store.folder, store.fact("plugins", []), error) from None


def values_of(store: Store, objective: Objective) -> list[float | None]:
    """Return an objective's value of each trial in the order told, None for what lacks it.

    Values are kept for as long as the store is open, by what a row says of its trial.
    """
    known = store.worked_out.setdefault(objective.name, {})
    marks = store.rows("SELECT key, status, stage, tokens, seconds FROM trials ORDER BY number")
    first = next((i for i, mark in enumerate(marks) if mark not in known), len(marks))
    new = store.trials(after=first) if first < len(marks) else []
    for mark, trial in zip(marks[first:], new, strict=True):
        known[mark] = None if trial.measurement.failure else objective.value(trial)
    return [known[mark] for mark in marks]
