"""Fronts: non-dominated rows, hypervolumes, and how both grew over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import moocore
import numpy as np
import pandas as pd

from ...metrics_dsl.errors import SecateurError
from ...search.core.objectives import density, look_up_objectives
from .frame import COLUMNS, frame
from .run_folder import explained

if TYPE_CHECKING:
    from .store import Store

DECIDED = ("measured", "alias")
HISTORY_COLUMNS = {
    "number": "the candidate's place in the order told, from 0",
    "candidates": "distinct candidates so far",
    "tokens": "tokens run through pruned models so far",
    "seconds": "of measuring so far",
    "best": "least value of the first objective so far; missing before there is one",
    "hypervolume": "that the front so far dominates, up to the reference",
}


def names_of(objectives: Sequence[str] | str, store: Store | None = None) -> list[str]:
    """Return the names of objectives given as a list or separated by commas.

    Raises:
        SecateurError: For an unknown objective; where a store is given, it says which plugin its run needs.
    """
    if isinstance(objectives, str):
        objectives = objectives.split(",")
    try:
        return [
            objective.name for objective in look_up_objectives([str(name).strip() for name in objectives])
        ]
    except SecateurError as error:
        if store is None:
            raise
        raise explained(store.folder, store.fact("plugins", []), error) from None


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Return which points (points, objectives) are finite and dominated by no other; of equal ones the first.

    moocore would rank NaN as if it were a number.
    """
    result = np.asarray(np.isfinite(points).all(axis=1))
    if result.any():
        result[result] = moocore.is_nondominated(points[result])
    return result


def front(rows: pd.DataFrame, objectives: Sequence[str] | str) -> pd.DataFrame:
    """Return the non-dominated rows of a frame, sorted by the first objective.

    Rows without a finite value of each objective are left out; of equal ones the first stays.

    Args:
        rows: A frame of an archive.
        objectives: Columns to minimise, as a list or separated by commas.

    Raises:
        SecateurError: For an unknown objective.
    """
    names = names_of(objectives)
    measured = rows[rows["status"].isin(DECIDED)]
    result = measured[non_dominated(measured[names].to_numpy(dtype=float))]
    result = result.sort_values(names, kind="stable")
    result.attrs = {**rows.attrs, "objectives": names}
    return result


def best_of(rows: pd.DataFrame, objectives: Sequence[str]) -> pd.Series | None:
    """Return the row that is chosen among some; None where none has the first objective.

    It has the least value of the first objective, on the tokens that a search sees; of equal ones the next
    objective decides, and then who came first. So a front's best is its first row. Everything that is called
    best is chosen here: what was found, what is published, and what ``best`` names. Holdout figures choose
    nothing.
    """
    known = rows[rows["status"].isin(DECIDED) & np.isfinite(rows[objectives[0]])]
    return None if known.empty else known.sort_values(list(objectives), kind="stable").iloc[0]


def front_of_store(store: Store, objectives: Sequence[str] | str) -> pd.DataFrame:
    """Return the same as ``front(store.frame(), objectives)``, reading whole rows of the front alone."""
    names = names_of(objectives, store)
    if any(name not in COLUMNS for name in names):
        return front(frame(store, objectives=names), names)
    selected = ", ".join("sparsity" if name == "density" else name for name in names)
    with store.reading():
        found = store.rows(
            f"SELECT number, {selected} FROM trials WHERE status IN ('measured', 'alias') ORDER BY number"
        )
        table = np.array(found, dtype=np.float64).reshape(-1, 1 + len(names))
        for place in [i for i, name in enumerate(names, 1) if name == "density"]:
            table[:, place] = density(table[:, place])
        numbers = table[non_dominated(table[:, 1:]), 0].astype(int).tolist()
        rows = frame(store, numbers)
    return front(rows.set_axis([n - 1 for n in numbers]) if numbers else rows, names)


def reference_of(rows: pd.DataFrame, names: Sequence[str]) -> list[float]:
    """Return the largest finite value of each objective among the rows that were measured to the end."""
    values = rows.loc[rows["status"].isin(DECIDED), list(names)].to_numpy(dtype=float)
    values = values[np.isfinite(values).all(axis=1)]
    return [float(v) for v in values.max(axis=0)] if len(values) else [1.0] * len(names)


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """Return the volume that points (points, objectives) dominate, up to a reference; 0 without points.

    Raises:
        SecateurError: When the reference has another number of objectives.
    """
    if points.shape[1] != len(reference):
        raise SecateurError(
            f"expected a reference of {points.shape[1]} numbers, one an objective, got {len(reference)}"
        )
    finite = points[np.isfinite(points).all(axis=1)]
    return float(moocore.hypervolume(finite, ref=np.asarray(reference, dtype=float))) if len(finite) else 0.0


def history(
    rows: pd.DataFrame, objectives: Sequence[str], reference: Sequence[float] | None = None
) -> pd.DataFrame:
    """Return one row a candidate with what had been found for what cost, as in ``HISTORY_COLUMNS``.

    Args:
        rows: A frame in the order told.
        objectives: Columns that are minimised.
        reference: Where hypervolumes end; the largest values that were measured if left out.
    """
    names = names_of(objectives)
    decided = rows["status"].isin(DECIDED).to_numpy()
    points = rows[names].to_numpy(dtype=float)
    known = decided & np.isfinite(points).all(axis=1)
    end = np.asarray(reference if reference is not None else reference_of(rows, names), dtype=float)
    first = np.where(known, points[:, 0] if len(points) else 0.0, np.inf)
    best = np.minimum.accumulate(first) if len(first) else first
    volumes = np.zeros(len(rows))
    members = np.empty((0, len(names)))
    volume = 0.0
    for i in np.flatnonzero(known):
        point = points[i]
        if not (members <= point).all(axis=1).any():  # else nothing new
            members = np.vstack([members[~(point <= members).all(axis=1)], point])
            volume = hypervolume(members, list(end))
        volumes[i] = volume
    volumes = np.maximum.accumulate(volumes) if len(volumes) else volumes
    own = rows["alias_of"].isna()
    result = pd.DataFrame({
        "number": np.arange(len(rows)),
        "candidates": own.cumsum().to_numpy(dtype="int64"),
        "tokens": rows["tokens"].where(own, 0).cumsum().to_numpy(),
        "seconds": rows["seconds"].where(own, 0.0).cumsum().to_numpy(),
        "best": np.where(np.isfinite(best), best, np.nan),
        "hypervolume": volumes,
    })  # fmt: skip
    result.attrs = {**rows.attrs, "objectives": names, "reference": [float(v) for v in end]}
    return result
