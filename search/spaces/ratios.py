"""Ratios that keep a budget: the projection onto a sparsity and the rounding to whole columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...metrics_dsl.errors import SecateurError
from ..core.candidate import Layer, removed_of

HIGHEST = 0.95  # a searched ratio leaves every layer a twentieth of its weights
_Floats = NDArray[np.float64]


def sizes(layers: Sequence[Layer]) -> _Floats:
    """Return the number of weights of each layer, (layers,)."""
    return np.array([layer.size for layer in layers], dtype=np.float64)


def project(
    ratios: ArrayLike, weights: ArrayLike, sparsity: float, low: float = 0.0, high: float = HIGHEST
) -> _Floats:
    """Return the nearest ratios within bounds whose weighted mean is the sparsity, (layers,).

    Nearest in the sum of weighted squares: all ratios move by the same amount and stop at the bounds. The
    mean is exact but for the rounding of floats.

    Args:
        ratios: Wanted ratios, (layers,), of any finite value.
        weights: Weights of each layer, (layers,).
        sparsity: The mean to hold.
        low: Least ratio.
        high: Largest ratio; taken as the middle between the sparsity and 1 where that is larger.

    Raises:
        SecateurError: When a ratio is not finite or no ratios within the bounds have that mean.
    """
    wanted = np.asarray(ratios, dtype=np.float64)
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    high = max(high, (1 + sparsity) / 2)
    if not (np.isfinite(wanted).all() and 0 <= low <= sparsity < 1):
        raise SecateurError(
            f"expected finite ratios and a sparsity in [{low:g}, 1), got a sparsity of {sparsity:g} and "
            f"ratios from {wanted.min()} to {wanted.max()}"
        )
    # The mean grows with the shift, linearly between the shifts at which a ratio meets a bound.
    below, above = low - wanted.max(), high - wanted.min()
    for _ in range(200):
        shift = (below + above) / 2
        if np.clip(wanted + shift, low, high) @ share < sparsity:
            below = shift
        else:
            above = shift
    result = np.clip(wanted + above, low, high)
    free = (result > low) & (result < high)
    if free.any():  # what bisection leaves over
        result[free] += (sparsity - result @ share) / share[free].sum()
    return np.asarray(np.clip(result, low, high), dtype=np.float64)


def ratio_of(count: int, columns: int) -> float:
    """Return the ratio that removes just ``count`` of ``columns`` weights per row: floats round down."""
    ratio = count / columns
    return ratio if removed_of(columns, ratio) == count else math.nextafter(ratio, 1.0)


_Counts = NDArray[np.int64]


def _mended(
    counts: _Counts, missing: float, rows: _Counts, columns: _Counts, fixed_rows: int = 0
) -> tuple[_Counts, float]:
    """Remove a column more or less of one layer after the other while that brings the sparsity nearer.

    Each time the layer changes that brings it nearest; of several that do, the last in model order.

    Args:
        counts: Columns to remove of each layer, (layers,).
        missing: How many weights must still be removed; negative where too many are.
        rows: Rows of each layer: the weights that a column has.
        columns: Columns of each layer.
        fixed_rows: Layers with just so many rows keep their counts.

    Returns:
        The new counts, and how many weights are missing with them.
    """
    counts = counts.copy()
    while True:
        step = 1 if missing > 0 else -1
        room = (counts + step >= 0) & (counts + step < columns) & (rows != fixed_rows)
        gain = np.where(room, abs(missing) - abs(missing - step * rows), -1.0)
        best = len(gain) - 1 - int(np.argmax(gain[::-1]))
        if gain[best] <= 0:
            return counts, missing
        counts[best] += step
        missing -= step * float(rows[best])


def to_columns(ratios: ArrayLike, layers: Sequence[Layer], sparsity: float) -> tuple[float, ...]:
    """Return ratios of whole columns per row whose achieved sparsity is as near the wanted as can be.

    Every ratio is rounded down, then those with the largest remainders up while weights are missing. What is
    left is at most half of a column of the smallest layer, as a share of all weights: 0.000001 on a model
    of 100 million weights.

    Args:
        ratios: Ratios in [0, 1), (layers,).
        layers: The layers they belong to.
        sparsity: The fraction of all weights to remove.
    """
    columns = np.array([layer.columns for layer in layers])
    rows = np.array([layer.rows for layer in layers])
    exact = np.asarray(ratios, dtype=np.float64) * columns
    counts = np.minimum(np.floor(exact + 1e-9).astype(int), columns - 1)
    missing = sparsity * float(rows @ columns) - float(rows @ counts)
    for i in np.argsort(np.round(exact - counts, 9), kind="stable")[::-1]:
        if rows[i] <= 2 * missing and counts[i] + 1 < columns[i]:
            counts[i] += 1
            missing -= rows[i]
    counts, missing = _mended(counts, missing, rows, columns)
    finest = float(rows.min()) / 2
    if abs(missing) > finest:  # layers are at their bounds: go too far with a large one, then mend that
        for size in sorted(set(rows.tolist())):
            step = 1 if missing > 0 else -1
            movable = (rows == size) & (counts + step >= 0) & (counts + step < columns)
            if movable.any():
                other = counts.copy()
                other[np.flatnonzero(movable)[-1]] += step
                mended = _mended(other, missing - step * size, rows, columns, size)
                counts, missing = min((counts, missing), mended, key=lambda found: abs(found[1]))
    return tuple(ratio_of(int(n), int(c)) for n, c in zip(counts, columns, strict=True))
