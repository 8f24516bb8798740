"""Objectives that others have added to a run: worked out from its trials."""

from __future__ import annotations

from collections.abc import Sequence
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


def values_of(store: Store, objective: Objective) -> Sequence[float | None]:
    """Return an objective's value of each trial in the order told, None for what lacks it.

    A trial that was told stays as it is, so each is worked out once for as long as the store is open.
    """
    known = store.worked_out.setdefault(objective.name, [])
    for trial in store.trials(after=len(known)):
        known.append(None if trial.measurement.failure else objective.value(trial))
    return known
