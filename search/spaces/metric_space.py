"""The space of metrics: random expressions of a wanted shape from a set of leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ...metrics_dsl.canonical import canonical
from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression, constant
from ...metrics_dsl.operators import COLUMN, FULL, LEAVES, OPERATORS, ROW, SCALAR, Operator, Shape
from ...metrics_dsl.order import order_form
from ..core import defaults

# Exponents that papers and hand-tuning use; mutation moves on from them.
EXPONENTS = (0.25, 0.75, 1.2, 1.5, 3.0, -1.0)
_SHAPES = (FULL, COLUMN, ROW, SCALAR)
_INFIX = ("add", "sub", "mul", "mul", "div")  # products as often as sums


@dataclass(frozen=True)
class MetricSpace:
    """Typed trees over some leaves, up to a size, in the simplest form of one order.

    Args:
        leaves: Names of the leaves that may occur; one that varies over rows and columns is among them.
        group: The weights that compete: what keeps their order is not worth a node.
        max_size: Most nodes that a metric may have.
        max_depth: Deepest tree that is drawn.
        operators: Names of the operators that may occur in the simplest form; all if left out.
    """

    leaves: frozenset[str]
    group: str = "row"
    max_size: int = defaults.MAX_SIZE
    max_depth: int = 5
    operators: frozenset[str] | None = None
    _words: _Words = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_size < 3:
            raise SecateurError(f"expected a largest size of at least 3 nodes, got {self.max_size}")
        object.__setattr__(self, "_words", _words(self.leaves, self.operators))

    def allows(self, operator: str) -> bool:
        """Whether an operator may occur."""
        return self.operators is None or operator in self.operators

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
        if not is_full or metric.size > self.max_size or not metric.leaves <= self.leaves:
            return False
        return self.operators is None or metric.operators <= self.operators

    def tree(self, rng: random.Random, shape: Shape, depth: int) -> Expression:
        """Return a random expression of a shape and at most a depth, not simplified."""
        if depth <= 1 or rng.random() < 0.15:
            leaf = self._leaf(rng, shape)
            if leaf is not None:
                return leaf
        words, kind = self._words, rng.random()
        if shape == SCALAR and kind < 0.7:
            return draw_constant(rng)
        if shape != FULL and kind < 0.35 and words.reductions[shape]:
            # Reductions are what connects a row or column to the weights; rows and columns have
            # few leaves of their own.
            return self._reduction(rng, shape, depth)
        if words.several and (kind < 0.6 or shape == SCALAR):
            return self._several(rng, shape, depth)
        if not words.unary or shape == SCALAR:
            return self._leaf(rng, shape) or self._reduction(rng, shape, depth)
        operand = self.tree(rng, shape, depth - 1)
        name = rng.choice(words.unary)
        if name == "pow":
            return Expression("pow", (operand,), rng.choice(EXPONENTS))
        return Expression(name, (operand,))

    def _leaf(self, rng: random.Random, shape: Shape) -> Expression | None:
        if shape == SCALAR:
            return draw_constant(rng)
        names = self._words.leaves[shape]
        return Expression(rng.choice(names)) if names else None

    def _reduction(self, rng: random.Random, shape: Shape, depth: int) -> Expression:
        return Expression(rng.choice(self._words.reductions[shape]), (self.tree(rng, FULL, depth - 1),))

    def _several(self, rng: random.Random, shape: Shape, depth: int) -> Expression:
        """Return an operation on several operands."""
        others = {FULL: (FULL, FULL, COLUMN, COLUMN, ROW, SCALAR), SCALAR: (SCALAR,)}
        other = rng.choice([s for s in others.get(shape, (shape, SCALAR)) if s in self._words.reachable])
        operands = [self.tree(rng, shape, depth - 1), self.tree(rng, other, depth - 1)]
        rng.shuffle(operands)
        name = rng.choice(self._words.several)
        operands += [self.tree(rng, shape, depth - 1) for _ in range(OPERATORS[name].arity - 2)]
        return Expression(name, tuple(operands))


class _Words(NamedTuple):
    """What trees are drawn from: leaves and reductions by the shape of their value, operators by operands."""

    leaves: dict[Shape, list[str]]
    reductions: dict[Shape, list[str]]
    unary: list[str]
    several: list[str]
    reachable: frozenset[Shape]


def _words(leaves: frozenset[str], operators: frozenset[str] | None) -> _Words:
    """Return what may be drawn of some leaves and operators; all operators if none are named.

    An operator whose shape is not that of its operands comes into trees by mutation alone.
    """
    allowed = [o for o in OPERATORS.values() if operators is None or o.name in operators]
    by_shape = {s: [n for n in LEAVES if n in leaves and LEAVES[n].shape == s] for s in _SHAPES}
    reductions = [o for o in allowed if o.kind == "reduction"]
    by_value = {s: [o.name for o in reductions if _value(o, FULL) == s] for s in _SHAPES}
    plain = [o for o in allowed if all(_value(o, *[s] * o.arity) == s for s in (FULL, COLUMN, ROW))]
    of_one = [[o.name for o in plain if o.arity == 1 and o.kind == kind and o.name not in ("pow", "neg")]
              for kind in ("elementwise", "normalisation")]  # fmt: skip
    power = ["pow"] if any(o.name == "pow" for o in allowed) else []
    infix = [name for name in _INFIX if any(o.name == name for o in allowed)]
    several = [o.name for o in plain if o.arity > 1 and o.name not in _INFIX]
    reachable = {SCALAR} | {s for s in _SHAPES if by_shape[s] or by_value[s]}
    return _Words(by_shape, by_value, [*of_one[0], *of_one[1], *power], infix + several, frozenset(reachable))


def _value(operator: Operator, *operands: Shape) -> Shape | None:
    try:
        return operator.shape(*operands)
    except ValueError:
        return None


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
