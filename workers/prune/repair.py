"""Repairs: making up for removed weights without bringing one back.

A repair works on one layer under a given mask, from its dense weights and its inputs' Gram matrix or the root
of it. Weights that the mask removes are 0 in whatever it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.plugins import guarded, open_table
from ..calibrate.gram import gram_matrix, is_root
from ..calibrate.input_statistics import DAMPING

_LAZY_COLUMNS = 128  # columns whose errors reach those further right together, as in SparseGPT


class RepairError(SecateurError):
    """Statistics that a repair cannot work with."""


class Repaired(NamedTuple):
    """A layer's new weights (rows, columns), and what to add to its bias (rows,), if it has one."""

    weights: Tensor
    shift: Tensor | None = None


def none(weights: Tensor, removed: Tensor, _gram: Tensor, _mean: Tensor) -> Repaired:
    """Return the weights with the removed ones at 0 and nothing else changed."""
    return Repaired(weights.masked_fill(removed, 0.0))


def bias(weights: Tensor, removed: Tensor, _gram: Tensor, mean: Tensor) -> Repaired:
    """Return the shift of the bias that keeps the mean output: the removed weights times the mean input."""
    shift = (weights * removed).double() @ mean.double()
    return Repaired(weights.masked_fill(removed, 0.0), shift.to(weights.dtype))


def scale(weights: Tensor, removed: Tensor, gram: Tensor, _mean: Tensor) -> Repaired:
    """Return each row times the number that brings its output nearest to the dense one's.

    For a dense row w and a pruned one p that number is w H p' / p H p', by least squares over the tokens.
    Prune&Comp (AAAI 2026) makes up for lost magnitude likewise, with ratios of mean magnitudes, one number
    for a removed block. A row without output, or whose number is not positive, stays as it is.
    """
    pruned = weights.masked_fill(removed, 0.0)
    product = pruned @ gram.T @ gram if is_root(gram) else pruned @ gram
    wanted = (product * weights).sum(1, dtype=torch.float64)
    power = (product * pruned).sum(1, dtype=torch.float64)
    factor = torch.where((power > 0) & (wanted > 0), wanted / power, 1.0)
    return Repaired(pruned * factor.to(pruned.dtype)[:, None])


def obs(weights: Tensor, removed: Tensor, gram: Tensor, _mean: Tensor) -> Repaired:
    """Return what SparseGPT's update makes of the weights under the given mask.

    Frantar and Alistarh 2023, arXiv 2301.00774: with U the upper Cholesky factor of the inverse of H, damped
    by a share of its mean diagonal, columns are visited from left to right; where a weight w of column j is
    removed, w / U_jj times row j of U is taken from its row, so that those further right make up for it. A
    removed weight collects the errors of those before it and passes them on.
    """
    # (columns, rows), a copy in which what a step touches lies together.
    rows = weights.T.clone(memory_format=torch.contiguous_format)
    factor = _upper_factor(gram_matrix(gram))
    gone = removed.T
    columns = len(rows)
    for start in range(0, columns, _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, columns)
        errors = torch.zeros_like(rows[start:end])
        for j in range(start, end):
            errors[j - start] = rows[j] * gone[j] / factor[j, j]
            rows[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)
        rows[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return Repaired(rows.T.masked_fill(removed, 0.0))


def _upper_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix, (columns, columns)."""
    damped = gram.double()  # a copy, unless it was 64-bit
    damped = damped.clone() if damped is gram else damped
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal.add_(DAMPING * mean if mean > 0 else 1.0)  # an expert that no token reached has no inputs
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError:  # torch's LinAlgError
        raise RepairError(
            "expected inputs whose Gram matrix can be inverted for the repair obs, got one that cannot; give "
            "more --tokens or another --repair"
        ) from None
    return factor.to(gram.dtype)


@dataclass(frozen=True)
class Repair:
    """One way to make up for removed weights.

    Attributes:
        name: The name on the command line.
        meaning: What it does.
        compute: From dense weights (rows, columns), which are removed (bool), the mean of x x' over the
            layer's inputs (columns, columns) and their mean (columns,).
        reads_root: Whether it also takes the root of that matrix, (tokens, columns), where tokens are fewer.
    """

    name: str
    meaning: str
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Repaired]
    reads_root: bool = False

    def __call__(self, weights: Tensor, removed: Tensor, gram: Tensor, mean: Tensor) -> Repaired:
        """Return the new weights of a layer.

        Raises:
            RepairError: When they cannot be computed.
        """
        return self.compute(weights, removed, gram if self.reads_root else gram_matrix(gram), mean)


REPAIRS: dict[str, Repair] = {
    repair.name: repair
    for repair in (
        Repair("none", "the kept weights stay as they are", none, True),
        Repair("obs", "SparseGPT's update under the given mask", obs, True),
        Repair("bias", "the bias makes up for the mean of what is lost", bias, True),
        Repair("scale", "each row is scaled to come nearest to its dense output", scale, True),
    )
}


def _admitted(repair: Repair, origin: str) -> Repair:
    """Return a repair of somebody else's whose results are checked."""
    what = f"the repair {repair.name} of {origin}"
    compute = guarded(repair.compute, what, RepairError)

    def checked(weights: Tensor, removed: Tensor, gram: Tensor, mean: Tensor) -> Repaired:
        found = Repaired(*compute(weights.clone(), removed, gram, mean))
        if found.weights.shape != weights.shape or bool(found.weights[removed].count_nonzero()):
            raise RepairError(f"{what} fails: expected the layer's weights with the removed ones at 0")
        if found.shift is not None and found.shift.shape != weights.shape[:1]:
            raise RepairError(f"{what} fails: expected a shift of {len(weights)} outputs, one a row")
        return found

    return replace(repair, compute=guarded(checked, what, RepairError))


open_table(REPAIRS, Repair, "a repair", "repairs", _admitted)
