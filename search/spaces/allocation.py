"""Published allocations: closed forms that say how many weights each layer loses.

Each is a function of plain arrays: one number a decoder block, reduced from the dense model's scores. All but
one spread density over blocks as an affine image of their number. Two rules hold for all, where papers
divide 0 by 0 or leave [0, 1): equal numbers spread nothing, which is uniform; and ratios that leave
[0, 0.99] are moved into it together by the projection, which also weights blocks of unequal size.
Ratios are rounded down to whole columns, as the papers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression
from ...metrics_dsl.plugins import guarded, open_table
from ...metrics_dsl.published import PUBLISHED
from ..core.candidate import Layer, Reduction
from .ratios import project, sizes

_Floats = NDArray[np.float64]
# What an evaluator hands out: reductions of a metric's scores on the dense model.
Summarise = Callable[[Expression, Sequence[Reduction]], dict[Reduction, _Floats]]
_CLOSED_HIGHEST = 0.99
_STEP, _MOST_STEPS = 0.002, 20  # ATP's step of the slope, and the most steps that are tried a direction


def minmax(values: ArrayLike) -> _Floats:
    """Return values mapped to [0, 1]; all 0 where they are equal."""
    array = np.asarray(values, dtype=np.float64)
    low, high = array.min(), array.max()
    return np.asarray((array - low) / (high - low)) if high > low else np.zeros_like(array)


def spread(values: ArrayLike, width: float, sparsity: float, weights: ArrayLike | None = None) -> _Floats:
    """Return ratios of blocks whose density grows with their value, (blocks,).

    density = minmax(value) * 2 width - its mean + 1 - sparsity: the form that OWL, DLP and DSA share. A
    negative width turns the direction round.

    Args:
        values: A finite number a block, (blocks,).
        width: Half of the difference between the densest and the sparsest block.
        sparsity: The weighted mean of the ratios.
        weights: Weights of each block, (blocks,); equal if left out.
    """
    extra = minmax(values) * 2 * width
    return _held(sparsity - (extra - float(extra.mean())), sparsity, weights)


def _held(ratios: _Floats, sparsity: float, weights: ArrayLike | None) -> _Floats:
    shares = np.ones_like(ratios) if weights is None else np.asarray(weights, dtype=np.float64)
    # Rounded, for the noise of floats would make 0.75 of 576 columns 431.
    return np.round(project(ratios, shares, sparsity, high=_CLOSED_HIGHEST), 10)


def arithmetic(blocks: int, slope: float, sparsity: float, weights: ArrayLike | None = None) -> _Floats:
    """Return sparsity + slope (i - (blocks - 1) / 2) for i = 0, 1, ...: ATP, Huang et al. 2025."""
    steps = np.arange(blocks, dtype=np.float64) - (blocks - 1) / 2
    return _held(sparsity + slope * steps, sparsity, weights)


def slopes(blocks: int, sparsity: float) -> list[float]:
    """Return the slopes that ATP tries, the positive ones first, then the same negative."""
    if blocks < 2:
        return []
    limit = 2 * min(sparsity, 1 - sparsity) / (blocks - 1)
    step = _STEP if limit <= _STEP * _MOST_STEPS else limit / _MOST_STEPS
    positive = [round(step * i, 6) for i in range(1, int(limit / step + 1e-9) + 1)]
    return positive + [-slope for slope in positive]


def owl(
    outliers: ArrayLike, sparsity: float, width: float = 0.08, weights: ArrayLike | None = None
) -> _Floats:
    """Return OWL's ratios from each block's share of scores above 5 times their mean (Yin et al. 2024)."""
    return spread(outliers, width, sparsity, weights)


def dlp(means: ArrayLike, sparsity: float, width: float = 0.15, weights: ArrayLike | None = None) -> _Floats:
    """Return DLP's ratios from each block's mean score: 1 - mean / sum is spread (arXiv 2505.23807)."""
    array = np.asarray(means, dtype=np.float64)
    total = array.sum()
    return spread(1 - array / total if total else array, width, sparsity, weights)


def dsa_importance(variances: ArrayLike) -> _Floats:
    """Return asin(atan(variance)), at its largest, pi / 2, above tan(1), where asin has no value."""
    array = np.minimum(np.asarray(variances, dtype=np.float64), math.tan(1.0))
    return np.asarray(np.arcsin(np.minimum(np.arctan(array), 1.0)))


def dsa(
    variances: ArrayLike, sparsity: float, width: float = 0.08, weights: ArrayLike | None = None
) -> _Floats:
    """Return DSA's published function of the variance of each block's log scores (Li et al. 2024).

    Its importance is spread the other way round. The authors' code puts 0 where importance has no value.
    """
    return spread(dsa_importance(variances), -width, sparsity, weights)


def alpha_pruning(
    exponents: ArrayLike, sparsity: float, width: float = 0.3, weights: ArrayLike | None = None
) -> _Floats:
    """Return AlphaPruning's ratios from each block's tail exponent (Lu et al. 2024).

    Factors from 1 - width to 1 + width, linear in the exponent, are scaled to the weighted sparsity.
    Equal exponents give equal factors.
    """
    array = np.asarray(exponents, dtype=np.float64)
    shares = np.ones_like(array) if weights is None else np.asarray(weights, dtype=np.float64)
    factors = 1 + width * (2 * minmax(array) - 1)
    return _held(factors * sparsity * shares.sum() / (factors @ shares), sparsity, shares)


def mrp(
    outliers: ArrayLike, sparsity: float, weights: ArrayLike | None = None, step: float = 0.001
) -> _Floats:
    """Return Maximum Redundancy Pruning's ratios from each block's share of outliers (arXiv 2503.18377).

    Our reading of the paper, which has no code: a score above 5 times the dense block's mean is an
    outlier, outliers go last, and the block with the largest share of other weights among those it
    has left loses a small step, until the budget is met. Of equal blocks the densest is next.
    """
    share = np.asarray(outliers, dtype=np.float64)
    own = np.ones_like(share) if weights is None else np.asarray(weights, dtype=np.float64)
    own = own / own.sum()
    ratios = np.zeros_like(share)
    while ratios @ own < sparsity:
        redundancy = 1 - share / (1 - ratios)
        redundancy[ratios + step > _CLOSED_HIGHEST] = -np.inf
        alike = np.flatnonzero(redundancy >= redundancy.max() - 1e-12)
        ratios[alike[np.argmin(ratios[alike])]] += step  # of equals the one that has lost least
    return _held(ratios, sparsity, own)


def one_threshold(quantiles: ArrayLike, sparsity: float, weights: ArrayLike, high: float = 0.9) -> _Floats:
    """Return the ratios under one threshold on all scores, no layer's above ``high``, (layers,).

    Args:
        quantiles: Evenly spaced quantiles of each layer's scores, ascending, (layers, points).
        sparsity: The weighted mean of the ratios.
        weights: Weights of each layer, (layers,).
        high: Largest ratio: a tenth of every layer is kept.
    """
    table = np.asarray(quantiles, dtype=np.float64)
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    high = max(high, (1 + sparsity) / 2)
    levels = np.linspace(0, 1, table.shape[1])

    def below(threshold: float) -> _Floats:
        found = np.array([np.interp(threshold, row, levels, left=0.0, right=1.0) for row in table])
        return np.asarray(np.minimum(found, high), dtype=np.float64)

    low, top = float(table.min()), float(table.max())
    for _ in range(200):
        middle = (low + top) / 2
        if below(middle) @ share < sparsity:
            low = middle
        else:
            top = middle
    return project(below(top), share, sparsity, high=high)


# The table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """What closed forms are computed from: the layers, their dense scores' summaries, and a metric."""

    layers: Sequence[Layer]
    summarise: Summarise
    metric: Expression

    def wanda(self, reduction: Reduction) -> _Floats:
        """Return one number a block from Wanda's scores, which the papers use, (blocks,)."""
        return self.summarise(PUBLISHED["wanda"].expression, [reduction])[reduction]

    @cached_property
    def block_ranks(self) -> list[int]:
        """Return each layer's block, counted among those that have layers: of others nothing is known."""
        own = {block: place for place, block in enumerate(sorted({layer.block for layer in self.layers}))}
        return [own[layer.block] for layer in self.layers]

    @property
    def blocks(self) -> int:
        """Number of decoder blocks that have layers."""
        return self.block_ranks[-1] + 1

    @property
    def block_sizes(self) -> _Floats:
        """Prunable weights of each block, (blocks,)."""
        counts = np.bincount(self.block_ranks, sizes(self.layers), self.blocks)
        return np.asarray(counts, dtype=np.float64)

    def of_blocks(self, ratios: _Floats) -> tuple[float, ...]:
        """Return each layer's ratio from its block's."""
        return tuple(float(ratios[place]) for place in self.block_ranks)


Variants = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Allocation:
    """A published allocation: ratios of all layers by label, from the dense model and a sparsity.

    Its one variant has its own name as label; it has several under other labels where its paper searches a
    number.
    """

    name: str
    source: str
    meaning: str
    variants: Callable[[Dense, float], Variants]

    def ratios(self, dense: Dense, sparsity: float) -> tuple[float, ...]:
        """Return each layer's ratio, of an allocation without a number to choose.

        Raises:
            SecateurError: For one with several variants.
        """
        found = self.variants(dense, sparsity)
        if self.name not in found:
            raise SecateurError(f"expected an allocation without a number to choose, got {self.name!r}")
        return found[self.name]


def _one(
    name: str, of_blocks: Callable[[Dense, float, _Floats], _Floats]
) -> Callable[[Dense, float], Variants]:
    return lambda dense, sparsity: {
        name: dense.of_blocks(of_blocks(dense, sparsity, dense.block_sizes)),
    }


def _ramps(dense: Dense, sparsity: float) -> Variants:
    return {
        f"atp {slope:+.4g}": dense.of_blocks(arithmetic(dense.blocks, slope, sparsity, dense.block_sizes))
        for slope in slopes(dense.blocks, sparsity)
    }


def _threshold(dense: Dense, sparsity: float) -> Variants:
    table = dense.summarise(dense.metric, ["quantiles"])["quantiles"]
    return {"global": tuple(map(float, one_threshold(table, sparsity, sizes(dense.layers))))}


ALLOCATIONS: dict[str, Allocation] = {
    allocation.name: allocation
    for allocation in (
        Allocation(
            "uniform", "-", "the same ratio everywhere",
            lambda dense, sparsity: {"uniform": (sparsity,) * len(dense.layers)},
        ),
        Allocation(
            "atp", "Huang et al. 2025, ICML", "a ramp over depth; slopes of both signs, 0.002 apart", _ramps
        ),
        Allocation(
            "owl", "Yin et al. 2024, arXiv 2310.05175", "dense where outliers are: M = 5, lambda = 0.08",
            _one("owl", lambda dense, s, n: owl(dense.wanda("outliers_5"), s, weights=n)),
        ),
        Allocation(
            "dlp", "Chen et al. 2025, arXiv 2505.23807", "sparse where scores are large: alpha = 0.15",
            _one("dlp", lambda dense, s, n: dlp(dense.wanda("mean"), s, weights=n)),
        ),
        Allocation(
            "alpha", "Lu et al. 2024, arXiv 2410.10912",
            "sparse where spectra have light tails: epsilon = 0.3, Hill estimate over the upper half",
            _one("alpha", lambda dense, s, n: alpha_pruning(
                dense.summarise(Expression("W"), ["tail"])["tail"], s, weights=n)),
        ),
        Allocation(
            "dsa", "Li et al. 2024, NeurIPS", "its published function of the variance of log scores: 0.08",
            _one("dsa", lambda dense, s, n: dsa(dense.wanda("log_variance"), s, weights=n)),
        ),
        Allocation(
            "mrp", "Gao et al. 2025, arXiv 2503.18377", "greedy on the share of no outliers (our reading)",
            _one("mrp", lambda dense, s, n: mrp(
                dense.summarise(dense.metric, ["outliers_5"])["outliers_5"], s, weights=n)),
        ),
        Allocation("global", "Han et al. 2015", "one threshold on the metric; a tenth of a layer stays",
                   _threshold),
    )
}  # fmt: skip


_OFF = 0.01  # how far from the sparsity the ratios of an allocation may be: they are of whole columns


def _admitted(allocation: Allocation, origin: str) -> Allocation:
    """Return an allocation of somebody else's whose variants are checked when they are computed."""
    what = f"the allocation {allocation.name} of {origin}"
    compute = guarded(allocation.variants, what)

    def variants(dense: Dense, sparsity: float) -> Variants:
        found = {label: tuple(map(float, ratios)) for label, ratios in compute(dense, sparsity).items()}
        weights = sizes(dense.layers)
        for label, ratios in found.items():
            if len(ratios) != len(dense.layers) or not all(0 <= ratio < 1 for ratio in ratios):
                raise SecateurError(
                    f"{what} fails: expected {len(dense.layers)} ratios in [0, 1) of {label!r}, one a layer, "
                    f"got {len(ratios)} from {min(ratios, default=0):g} to {max(ratios, default=0):g}"
                )
            mean = float(np.average(ratios, weights=weights))
            if abs(mean - sparsity) > _OFF:
                raise SecateurError(
                    f"{what} fails: expected ratios that remove {sparsity:g} of the weights, got {mean:.4g}"
                )
        if not found or (len(found) == 1 and allocation.name not in found):
            raise SecateurError(f"{what} fails: expected one variant {allocation.name!r}, got {list(found)}")
        return found

    return replace(allocation, variants=guarded(variants, what))


open_table(ALLOCATIONS, Allocation, "an allocation", "allocations", _admitted)
