"""Scoring: what an expression is worth for every weight of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from .expression import Expression, MetricError
from .operators import OPERATORS

if TYPE_CHECKING:
    from torch import Tensor

# What was reduced from all rows of a layer: a reduction's value, or a normalisation's statistics.
Reduced = MutableMapping[Expression, tuple["Tensor", ...]]


def score(expression: Expression, leaves: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of a layer's weights, (rows, columns); larger means keep.

    Args:
        expression: A metric.
        leaves: Tensors by leaf name, (rows, columns), (1, columns) or (rows, 1) as in ``LEAVES``, all of
            one floating type, in which the scores are computed. ``W`` is always there.

    Raises:
        MetricError: When the expression uses a leaf that is not given.
    """
    return Scorer(leaves).score(expression)


class Scorer:
    """Scores one layer and computes each subexpression once for as long as it lives.

    Scores may be wanted for some rows only (the screen stage). What is reduced over the rows or over
    the whole matrix is still computed from all rows, and kept in ``reduced``, which may outlive the
    scorer: a few numbers a layer that save a pass over all its weights.

    Args:
        leaves: Tensors over all rows by leaf name, as for ``score``.
        sampled: The same over the wanted rows; all rows if left out.
        reduced: Where reductions of all rows are kept.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        sampled: Mapping[str, Tensor] | None = None,
        reduced: Reduced | None = None,
    ) -> None:
        self._leaves = leaves
        self._wanted = leaves if sampled is None else sampled
        self._values: dict[Expression, Tensor] = {}
        self._reduced: Reduced = {} if reduced is None else reduced

    def score(self, expression: Expression) -> Tensor:
        """Return the value of an expression over the wanted rows, in its own shape."""
        return self._value(expression, self._wanted, self._values)

    def _value(self, e: Expression, leaves: Mapping[str, Tensor], values: dict[Expression, Tensor]) -> Tensor:
        if e.value is not None and not e.args:
            from torch import finfo

            leaf = next(iter(leaves.values()))
            # Beyond the type a number is infinite, and the score is told not to be finite.
            is_held = abs(e.value) <= finfo(leaf.dtype).max
            return leaf.new_full((1, 1), e.value if is_held else math.copysign(math.inf, e.value))
        if not e.args:
            if e.op not in leaves:
                raise MetricError(
                    f"the metric `{e}` needs {e.op}, which the calibration does not hold; calibrate "
                    "again with gradients or choose a metric without it"
                )
            return leaves[e.op]
        if e not in values:
            operator = OPERATORS[e.op]
            if operator.kind == "reduction" and not (e.shape.rows and e.args[0].shape.rows):
                return self._reduction(e)[0]
            operands = [self._value(arg, leaves, values) for arg in e.args]
            extra = self._reduction(e) if operator.kind == "normalisation" else ()
            exponent = () if e.value is None else (e.value,)
            values[e] = operator.compute(*operands, *extra, *exponent)
        return values[e]

    def _reduction(self, e: Expression) -> tuple[Tensor, ...]:
        """Return what e reduces from all rows, whatever rows are wanted."""
        if e not in self._reduced:
            operator = OPERATORS[e.op]
            # Values over all rows of a sampled layer are large and rarely wanted twice: not kept.
            values = self._values if self._wanted is self._leaves else {}
            operand = self._value(e.args[0], self._leaves, values)
            if operator.statistics is not None:
                self._reduced[e] = operator.statistics(operand)
            else:
                self._reduced[e] = (operator.compute(operand),)
        return self._reduced[e]
