"""Summaries of a dense model's scores, from which closed-form allocations are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...search.core.candidate import Reduction

QUANTILES = 1025
Each = Callable[[Callable[[Tensor], Any], Sequence[Tensor]], list[Any]]


def of_block(scores: Sequence[Tensor], reduction: Reduction, each: Each) -> float:
    """Return one number from the scores of a block's layers, each (rows, columns), taken together.

    ``outliers_M`` is the share of scores above M times their mean; ``log_variance`` the variance of the
    logarithms of the positive ones; ``norm`` the root-mean-square; ``tail`` the mean over layers of
    ``tail_exponent``.

    Args:
        scores: One matrix a layer.
        reduction: What to compute.
        each: Maps a function over the layers, in parallel.
    """
    if reduction == "tail":
        return float(np.mean(each(tail_exponent, scores)))
    if reduction == "maximum":
        return float(max(each(lambda matrix: float(matrix.max()), scores)))
    if reduction == "log_variance":
        count, total, squares = np.sum(each(_log_sums, scores), axis=0)
        return float(squares / count - (total / count) ** 2) if count else 0.0
    size = sum(matrix.numel() for matrix in scores)
    if reduction == "norm":
        return float((sum(each(lambda m: float(m.square().sum(dtype=torch.float64)), scores)) / size) ** 0.5)
    mean = sum(each(lambda matrix: float(matrix.sum(dtype=torch.float64)), scores)) / size
    if reduction == "mean":
        return mean
    if reduction == "variance":
        return sum(each(lambda m: float((m - mean).square().sum(dtype=torch.float64)), scores)) / size
    limit = float(reduction.removeprefix("outliers_")) * mean
    return sum(each(lambda matrix: int((matrix > limit).count_nonzero()), scores)) / size


def _log_sums(matrix: Tensor) -> tuple[int, float, float]:
    """Return how many scores are positive, and the sums of their logarithms and of their squares."""
    positive = matrix > 0
    logs = torch.where(positive, matrix, 1.0).log_()
    total = float(logs.sum(dtype=torch.float64))
    return int(positive.count_nonzero()), total, float(logs.square_().sum(dtype=torch.float64))


def tail_exponent(matrix: Tensor) -> float:
    """Return Hill's estimate of the power law in a matrix's spectrum, from its upper half.

    1 + k / sum(log(l_i / l_k)) over the k largest squared singular values, k being half of them: the
    PL_Alpha_Hill of AlphaPruning (Lu et al. 2024). A matrix whose upper half is flat has none: 0.
    """
    # 32 bits serve: what they lose are the small values, and those are left out.
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).clamp(min=0).double()
    upper = values[len(values) // 2 :]
    upper = upper[upper > 0]
    if len(upper) < 2:
        return 0.0
    total = float((upper / upper[0]).log().sum())
    return 1 + len(upper) / total if total > 0 else 0.0


def quantiles(scores: Tensor) -> NDArray[np.float64]:
    """Return evenly spaced quantiles of a layer's scores, ascending, (QUANTILES,)."""
    flat = np.sort(scores.reshape(-1).cpu().numpy())
    positions = np.linspace(0, len(flat) - 1, QUANTILES)
    return np.asarray(flat[np.rint(positions).astype(int)], dtype=np.float64)
