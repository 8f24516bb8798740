"""Summaries of a dense model's scores, from which closed-form allocations are computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..search.candidate import Reduction

QUANTILES = 1025


def of_block(scores: Sequence[Tensor], reduction: Reduction) -> float:
    """Return one number from the scores of a block's layers, each (rows, columns), taken together.

    ``outliers_M`` is the share of scores above M times their mean; ``log_variance`` the variance of the
    logarithms of the positive ones; ``norm`` the root-mean-square; ``tail`` the mean over layers
    of ``tail_exponent``.
    """
    if reduction == "tail":
        return float(np.mean([tail_exponent(matrix) for matrix in scores]))
    count = sum(matrix.numel() for matrix in scores)
    mean = sum(float(matrix.sum(dtype=torch.float64)) for matrix in scores) / count
    if reduction == "mean":
        return mean
    if reduction == "maximum":
        return max(float(matrix.max()) for matrix in scores)
    if reduction == "norm":
        return float((sum(float(matrix.double().square().sum()) for matrix in scores) / count) ** 0.5)
    if reduction == "variance":
        return sum(float((matrix.double() - mean).square().sum()) for matrix in scores) / count
    if reduction == "log_variance":
        logs = torch.cat([matrix[matrix > 0].log() for matrix in scores])
        return float(logs.double().var(correction=0)) if len(logs) else 0.0
    times = float(reduction.removeprefix("outliers_"))
    return sum(int((matrix > times * mean).count_nonzero()) for matrix in scores) / count


def tail_exponent(matrix: Tensor) -> float:
    """Return Hill's estimate of the power law in a matrix's spectrum, from its upper half.

    1 + k / sum(log(l_i / l_k)) over the k largest squared singular values, k being half of them: the
    PL_Alpha_Hill of AlphaPruning (Lu et al. 2024). A matrix whose upper half is flat has none: 0.
    """
    wide = matrix.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
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
