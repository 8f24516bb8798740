"""Reconstruction error: what removing weights does to a layer's outputs, from its Gram matrix.

With H the mean of x x' over tokens, the mean squared change of the outputs is the sum over rows of
d H d', d being the removed weights of a row, at a cost that does not depend on the tokens.
"""

from __future__ import annotations

from torch import Tensor


def output_energy(weights: Tensor, gram: Tensor) -> Tensor:
    """Return the mean square of each output without bias over tokens, (rows,), in 64-bit floats.

    Args:
        weights: (rows, columns).
        gram: Mean of x x' over tokens, (columns, columns).
    """
    return ((weights @ gram).double() * weights).sum(1)


def relative_error(weights: Tensor, removed: Tensor, gram: Tensor, energy: Tensor) -> float:
    """Return the squared output error of pruned rows relative to their output, without unit.

    Args:
        weights: (rows, columns), all rows of a layer or a sample of them.
        removed: Which weights are removed, (rows, columns) bool.
        gram: Mean of x x' over tokens, (columns, columns).
        energy: ``output_energy`` of the same rows, (rows,).
    """
    difference = weights * removed
    error = (difference @ gram).mul_(difference).sum(1).double().sum()
    whole = energy.sum()
    return float(error / whole) if whole > 0 else 0.0
