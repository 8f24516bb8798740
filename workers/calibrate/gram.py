"""Reconstruction error: what removing weights does to a layer's outputs, from its Gram matrix.

With H the mean of x x' over tokens, the mean squared change of the outputs is the sum over rows of
d H d', d being the removed weights of a row, at a cost that does not depend on the tokens.

Where tokens are fewer than columns they are kept instead, divided by the square root of their number: a
root R (tokens, columns) with H = R'R. It is the smaller of the two, d H d' is the square of R d', and its
shape tells it from a Gram matrix, which is square. Functions here take either.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns taken at a time. H is symmetric, so the blocks above its diagonal count twice and those below
# are never touched: near half of the arithmetic for a fraction of the speed of each product.
_COLUMNS = {"cpu": 192, "cuda": 2048}


def is_root(gram: Tensor) -> bool:
    """Return whether these are tokens, which are fewer than their columns, and not a Gram matrix."""
    return gram.shape[0] < gram.shape[1]


def gram_matrix(gram: Tensor) -> Tensor:
    """Return the Gram matrix, (columns, columns), of itself or of its root."""
    return gram.T @ gram if is_root(gram) else gram


def output_energy(weights: Tensor, gram: Tensor) -> Tensor:
    """Return the mean square of each output without bias over tokens, (rows,), in 64-bit floats.

    Args:
        weights: (rows, columns).
        gram: Mean of x x' over tokens, (columns, columns), or its root, (tokens, columns).
    """
    return quadratic_form(weights, gram)


def relative_error(weights: Tensor, removed: Tensor, gram: Tensor, energy: Tensor) -> float:
    """Return the squared output error of pruned rows relative to their output, without unit.

    Args:
        weights: (rows, columns), all rows of a layer or a sample of them.
        removed: Which weights are removed, (rows, columns) bool.
        gram: Mean of x x' over tokens, (columns, columns), or its root, (tokens, columns).
        energy: ``output_energy`` of the same rows, (rows,).
    """
    whole = energy.sum()
    return float(quadratic_form(weights * removed, gram).sum() / whole) if whole > 0 else 0.0


def quadratic_form(rows: Tensor, gram: Tensor) -> Tensor:
    """Return d H d' of each row d, (rows,), in 64-bit floats.

    Args:
        rows: (rows, columns).
        gram: Symmetric, (columns, columns), or its root, (tokens, columns).
    """
    columns = rows.shape[1]
    if is_root(gram):
        return (rows @ gram.T).square_().sum(1).double()
    width = _COLUMNS.get(rows.device.type, 192)
    if len(rows) <= 64 and columns <= 4 * width:
        width = columns  # so small that calls would cost more than the arithmetic they save
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, columns, width):
        end = min(start + width, columns)
        own = rows[:, start:end]
        product = own @ gram[start:end, start:end]
        if start:
            product.addmm_(rows[:, :start], gram[:start, start:end], alpha=2.0)
        total += product.mul_(own).sum(1)
    return total
