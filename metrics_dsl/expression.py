"""Expressions: frozen trees that give every weight of a linear layer a score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .errors import MetricError as MetricError  # known by this name from here
from .operators import FULL, LEAVES, OPERATORS, SCALAR, Shape

# Limits keep a proposal readable and every recursion over a tree far from Python's own limit.
MAX_DEPTH = 64
MAX_EXPONENT = 16.0


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """A node of a metric: a leaf, a constant, or an operator over smaller expressions.

    Nodes are compared by value and may be shared between trees. The facts that everybody asks for
    (``size``, ``depth``, ``shape``, ``nonnegative``) are worked out once, when a node is made, so an
    ``Expression`` that exists has a valid shape.

    Args:
        op: Name of a leaf (``"W"``), ``"const"``, or an operator of ``OPERATORS``.
        args: Operands.
        value: The number of a constant, or the exponent of ``pow``.

    Raises:
        MetricError: For an unknown name, a wrong number of operands, a constant that is not finite,
            a reduction over an axis that its operand does not have, or a tree that is too deep.
    """

    op: str
    args: tuple[Expression, ...] = ()
    value: float | None = None
    size: int = field(init=False, repr=False)
    depth: int = field(init=False, repr=False)
    shape: Shape = field(init=False, repr=False)
    nonnegative: bool = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise MetricError(f"expected a finite number, got {self.value}; write one such as 0.5")
        if self.op == "const":
            if self.value is None or self.args:
                raise MetricError("a constant has a value and no operands")
            value = float(self.value) + 0.0  # -0.0 and 0.0 are one constant
            self._set(value=value, shape=SCALAR, nonnegative=value >= 0)
        elif self.op in LEAVES:
            if self.args or self.value is not None:
                raise MetricError(f"the leaf {self.op} takes no operands")
            leaf = LEAVES[self.op]
            self._set(shape=leaf.shape, nonnegative=leaf.nonnegative)
        elif self.op in OPERATORS:
            self._check_operator()
        else:
            raise MetricError(f"unknown operator or leaf {self.op!r}")
        self._set(
            size=1 + (self.op == "pow") + sum(arg.size for arg in self.args),
            depth=1 + max((arg.depth for arg in self.args), default=0),
            _hash=hash((self.op, self.args, self.value)),
        )
        if self.depth > MAX_DEPTH:
            raise MetricError(f"expected at most {MAX_DEPTH} levels of nesting; shorten the metric")

    def _check_operator(self) -> None:
        operator = OPERATORS[self.op]
        if len(self.args) != operator.arity:
            raise MetricError(f"{self.op} takes {operator.arity} operand(s), got {len(self.args)}")
        if (self.op == "pow") != (self.value is not None):
            raise MetricError("pow, and only pow, takes an exponent, which is a number")
        if self.value is not None:
            self._set(value=float(self.value))
            if not 0 < abs(self.value) <= MAX_EXPONENT:
                raise MetricError(
                    f"expected an exponent between -{MAX_EXPONENT:g} and {MAX_EXPONENT:g} "
                    f"other than 0, got {self.value:g}"
                )
        try:
            shape = operator.shape(*(arg.shape for arg in self.args))
        except ValueError as error:
            raise MetricError(f"{self.op}: {error}") from None
        signs = tuple(arg.nonnegative for arg in self.args)
        self._set(shape=shape, nonnegative=operator.nonnegative(signs, self.value))

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expression):
            return NotImplemented
        return (
            self._hash == other._hash
            and self.op == other.op
            and self.value == other.value
            and self.args == other.args
        )

    def __str__(self) -> str:
        return to_text(self)

    @property
    def leaves(self) -> frozenset[str]:
        """Names of the leaves that occur in the tree, constants left out."""
        if self.op in LEAVES:
            return frozenset((self.op,))
        return frozenset().union(*(arg.leaves for arg in self.args))

    @property
    def operators(self) -> frozenset[str]:
        """Names of the operators that occur in the tree."""
        own = frozenset((self.op,)) if self.args else frozenset()
        return own.union(*(arg.operators for arg in self.args))


def constant(value: float) -> Expression:
    """Return the expression of a finite number."""
    return Expression("const", (), value)


def check_metric(expression: Expression) -> Expression:
    """Return the expression if it can score the weights of a layer one by one.

    Raises:
        MetricError: When its shape is not (rows, columns), so that all weights of a row, of a column
            or of the layer would get one score.
    """
    if expression.shape == FULL:
        return expression
    one_score = {
        SCALAR: "every weight of the layer gets the same score",
        Shape(True, False): "every weight of a row gets the same score, whatever its column",
        Shape(False, True): "every weight of a column gets the same score, whatever its row",
    }[expression.shape]
    raise MetricError(
        f"expected a score of shape (rows, columns), got {expression.shape} from `{expression}`: "
        f"{one_score}; use W or G, as in `abs(W) * X`"
    )


# Notation: the text that `parse` reads back to the same tree -----------------------------------------

# Binding strength of what a node prints, in Python's own order, which is what the parser reads.
_STRENGTH = {"add": 1, "sub": 1, "mul": 2, "div": 2, "neg": 3, "pow": 4}
_ATOM = 5


def number_text(value: float) -> str:
    """Return the shortest text that reads back as the same number."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _strength(expression: Expression) -> int:
    if expression.op == "const":
        return _ATOM if expression.nonnegative else _STRENGTH["neg"]
    if expression.op == "neg" and expression.args[0].op == "const":
        return _ATOM
    return _STRENGTH.get(expression.op, _ATOM)


def to_text(expression: Expression) -> str:
    """Return the text of an expression: ``parse(to_text(e)) == e`` for every expression."""
    op, args = expression.op, expression.args
    if op == "const":
        assert expression.value is not None
        return number_text(expression.value)
    if not args:
        return op

    def operand(index: int, weakest: int) -> str:
        text = to_text(args[index])
        return text if _strength(args[index]) >= weakest else f"({text})"

    if OPERATORS[op].symbol and len(args) == 2:
        strength = _STRENGTH[op]  # both associate to the left, so an equal on the right is wrapped
        return f"{operand(0, strength)} {OPERATORS[op].symbol} {operand(1, strength + 1)}"
    if op == "pow":
        assert expression.value is not None
        return f"{operand(0, _ATOM)}**{number_text(expression.value)}"
    if op == "neg" and args[0].op != "const":  # -2 is the constant, neg(2) the operation
        return f"-{operand(0, _STRENGTH['pow'])}"
    return f"{op}({', '.join(map(to_text, args))})"
