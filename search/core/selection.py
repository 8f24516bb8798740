"""Selection among points of several objectives: non-dominated ranks, then crowding."""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np


def best_first(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the positions of points in the order of selection (NSGA-II, Deb et al. 2002).

    By value for one objective; by non-dominated rank and then by crowding distance, the lonely ones
    first, for several. Equal ones stay in order.
    """
    if not points:
        return []
    table = np.asarray(points, dtype=np.float64)
    if table.shape[1] == 1:
        return [int(i) for i in np.argsort(table[:, 0], kind="stable")]
    ranks = moocore.pareto_rank(table)
    crowding = np.zeros(len(table))
    for rank in np.unique(ranks):
        members = np.flatnonzero(ranks == rank)
        crowding[members] = _crowding(table[members])
    return [int(i) for i in np.lexsort((-crowding, ranks))]


def _crowding(points: np.ndarray) -> np.ndarray:
    """Return the sum over objectives of the distance between each point's neighbours, (points,)."""
    result = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        if width > 0:
            result[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
        result[order[[0, -1]]] = np.inf
    return result
