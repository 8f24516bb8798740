"""The space of metrics: random expressions of a wanted shape from a set of leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ...metrics_dsl.canonical import canonical
from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression, constant
from ...metrics_dsl.operators import COLUMN, FULL, LEAVES, OPERATORS, ROW, SCALAR, Shape
from ...metrics_dsl.order import order_form

# Exponents that papers and hand-tuning use; mutation moves on from them.
EXPONENTS = (0.25, 0.75, 1.2, 1.5, 3.0, -1.0)
_ELEMENTWISE = [
    o.name
    for o in OPERATORS.values()
    if o.kind == "elementwise" and o.arity == 1 and o.name not in ("pow", "neg")
]
_REDUCTIONS = {
    shape: [name for name in OPERATORS if name.startswith(f"{axis}_")]
    for shape, axis in ((ROW, "row"), (COLUMN, "col"), (SCALAR, "all"))
}


@dataclass(frozen=True)
class MetricSpace:
    """Typed trees over some leaves, up to a size, in the simplest form of one order.

    Args:
        leaves: Names of the leaves that may occur; ``W`` is among them.
        group: The weights that compete: what keeps their order is not worth a node.
        max_size: Most nodes that a metric may have.
        max_depth: Deepest tree that is drawn.
    """

    leaves: frozenset[str]
    group: str = "row"
    max_size: int = 20
    max_depth: int = 5
    _by_shape: dict[Shape, list[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_size < 3:
            raise SecateurError(f"expected a largest size of at least 3 nodes, got {self.max_size}")
        by_shape = {
            shape: [n for n in LEAVES if n in self.leaves and LEAVES[n].shape == shape]
            for shape in (FULL, COLUMN, ROW)
        }
        object.__setattr__(self, "_by_shape", by_shape)

    def draw(self, rng: random.Random) -> Expression:
        """Return a random metric of the space."""
        while True:
            metric = self.simplest(self.tree(rng, FULL, rng.randint(2, self.max_depth)))
            if metric is not None:
                return metric

    def simplest(self, metric: Expression) -> Expression | None:
        """Return the order form of a metric if it fits the space."""
        form = order_form(metric, self.group)
        return form if self.fits(form) else None

    def fits(self, metric: Expression) -> bool:
        """Whether an expression is a metric of this space."""
        is_full = metric.shape == canonical(metric).shape == FULL
        return is_full and metric.size <= self.max_size and metric.leaves <= self.leaves

    def tree(self, rng: random.Random, shape: Shape, depth: int) -> Expression:
        """Return a random expression of a shape and at most a depth, not simplified."""
        if depth <= 1 or rng.random() < 0.15:
            leaf = self._leaf(rng, shape)
            if leaf is not None:
                return leaf
        kind = rng.random()
        if shape == SCALAR and kind < 0.7:
            return draw_constant(rng)
        if shape != FULL and kind < 0.35:
            # Reductions are what connects a row or column to the weights; rows and columns have
            # few leaves of their own.
            return Expression(rng.choice(_REDUCTIONS[shape]), (self.tree(rng, FULL, depth - 1),))
        if kind < 0.6 or shape == SCALAR:
            return self._binary(rng, shape, depth)
        operand = self.tree(rng, shape, depth - 1)
        name = rng.choice([*_ELEMENTWISE, "minmax", "zscore", "pow"])
        if name == "pow":
            return Expression("pow", (operand,), rng.choice(EXPONENTS))
        return Expression(name, (operand,))

    def _leaf(self, rng: random.Random, shape: Shape) -> Expression | None:
        if shape == SCALAR:
            return draw_constant(rng)
        names = self._by_shape[shape]
        return Expression(rng.choice(names)) if names else None

    def _binary(self, rng: random.Random, shape: Shape, depth: int) -> Expression:
        others = {FULL: (FULL, FULL, COLUMN, COLUMN, ROW, SCALAR), SCALAR: (SCALAR,)}
        other = rng.choice(others.get(shape, (shape, SCALAR)))
        operands = [self.tree(rng, shape, depth - 1), self.tree(rng, other, depth - 1)]
        rng.shuffle(operands)
        return Expression(rng.choice(("add", "sub", "mul", "mul", "div")), tuple(operands))


def draw_constant(rng: random.Random) -> Expression:
    """Return a constant between 0.01 and 100, uniform in the logarithm, of two digits."""
    return constant(float(f"{10 ** rng.uniform(-2, 2):.2g}"))


def replace_at(expression: Expression, index: int, change: Callable[[Expression], Expression]) -> Expression:
    """Return the expression with its index-th node, counted from the root downwards, changed."""
    if index == 0:
        return change(expression)
    index -= 1
    args = list(expression.args)
    for i, arg in enumerate(args):
        count = sum(1 for _ in walk(arg))
        if index < count:
            args[i] = replace_at(arg, index, change)
            break
        index -= count
    return Expression(expression.op, tuple(args), expression.value)


def walk(expression: Expression) -> list[Expression]:
    """Return all nodes, root first, each before its operands."""
    return [expression, *(node for arg in expression.args for node in walk(arg))]
