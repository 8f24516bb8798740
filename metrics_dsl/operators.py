"""The words of the metric language: its leaves and operators, in two tables.

Parser, scoring, canonical form, notation and documentation read these tables and nothing else, so an
operator added here exists everywhere; plugins add theirs at the end of this file. Functions work on torch
tensors through tensor methods; torch itself is not imported, which keeps parsing and the command line light.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import MetricError, SecateurError
from .plugins import PluginError, guarded, open_table

if TYPE_CHECKING:
    from torch import Tensor

LOG_OFFSET = 1e-3  # the offset of Pruner-Zero's released grammar: log(|x| + 1e-3)
EXP_LIMIT = 80.0  # exp(80) = 5.5e34 is still finite in 32-bit floats


class Shape(NamedTuple):
    """Whether a value varies over the rows and over the columns of a weight matrix."""

    rows: bool
    columns: bool

    def __str__(self) -> str:
        return f"({'rows' if self.rows else 1}, {'columns' if self.columns else 1})"


FULL, COLUMN, ROW, SCALAR = (
    Shape(True, True),
    Shape(False, True),
    Shape(True, False),
    Shape(False, False),
)


@dataclass(frozen=True)
class Leaf:
    """A quantity that calibration provides for each linear layer.

    Attributes:
        name: The name in text, with a capital first.
        shape: Whether it varies over rows and columns.
        nonnegative: Whether it is known to be at least 0.
        meaning: What it is.
        unit: Of its values.
        needs: What it is computed from: leaves that calibration holds, and ``H`` for the mean of x x' over
            tokens, (columns, columns).
        compute: Computes it for one layer from a mapping with the tensors that it needs, each (rows,
            columns), (1, columns) or (rows, 1); None for what calibration itself computes.
        latex: Its symbol, with {i} and {j} for row and column; its name if left out.
    """

    name: str
    shape: Shape
    nonnegative: bool
    meaning: str
    unit: str
    needs: tuple[str, ...] = ()
    compute: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    latex: str = ""


LEAVES: dict[str, Leaf] = {
    leaf.name: leaf
    for leaf in (
        Leaf("W", FULL, False, "weight", "weight"),
        Leaf("G", FULL, True, "root-mean-square over sequences of the gradient of the mean "
             "next-token loss of a sequence", "nats per token / weight"),
        Leaf("X", COLUMN, True, "root-mean-square of an input feature over tokens", "activation"),
        Leaf("M", COLUMN, False, "mean of an input feature over tokens", "activation"),
        Leaf("V", COLUMN, True, "unbiased variance of an input feature over tokens", "activation^2"),
        Leaf("D", COLUMN, True, "diagonal of the inverse of the Gram matrix (mean over tokens), "
             "damped by 1 % of its mean diagonal", "1 / activation^2"),
        Leaf("Y", ROW, True, "root-mean-square of an output feature over tokens", "activation"),
    )
}  # fmt: skip


def broadcast(*shapes: Shape) -> Shape:
    """Return the shape of values computed one by one from operands."""
    return Shape(any(s.rows for s in shapes), any(s.columns for s in shapes))


def never(_signs: tuple[bool, ...], _value: float | None) -> bool:
    """Return that nothing is known of a value's sign."""
    return False


@dataclass(frozen=True)
class Operator:
    """One operator with all that the package knows about it.

    Attributes:
        name: The name in text, as in ``sqrt(x)``.
        symbol: The infix or prefix symbol, if text uses one.
        arity: Number of operands.
        kind: ``elementwise``, ``reduction`` (loses an axis) or ``normalisation`` (keeps the shape, but
            needs statistics of the whole matrix).
        meaning: Exact semantics in real arithmetic.
        compute: The tensor function; reductions are given tensors with both axes, normalisations
            are given the tensor and then the numbers that ``statistics`` returned.
        order: What the operator does to the order of scores: ``increasing`` or ``decreasing`` in its
            operand, ``magnitude`` (increasing in the operand's absolute value; for ``pow`` it depends
            on the exponent), or empty when there is no such rule.
        shape: Shape of the value from the shapes of the operands; ValueError when there is none.
        nonnegative: Whether the value is known to be at least 0, from the operands' and the exponent.
        number: The same function for plain numbers, where one exists.
        statistics: For normalisations, two (1, 1) tensors from the operand over the whole matrix.
        python: The function as a torch expression for exports, with {0} and {1} for operands, over all
            rows and columns; without it exports as code refuse the operator.
        latex: The function as LaTeX, with {0} and {1}; its name before brackets if left out.
    """

    name: str
    arity: int
    kind: str
    meaning: str
    compute: Callable[..., Any]
    order: str = ""
    shape: Callable[..., Shape] = broadcast
    nonnegative: Callable[[tuple[bool, ...], float | None], bool] = never
    number: Callable[..., float] | None = None
    symbol: str = ""
    statistics: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    python: str = ""
    latex: str = ""


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0 (a dead feature then counts for nothing)."""
    return (a / b).masked_fill(b == 0, 0.0)


def power(x: Tensor, exponent: float) -> Tensor:
    """Return x**exponent, of |x| for a fractional exponent, and 0 at 0 for a negative one."""
    result = (x if float(exponent).is_integer() else x.abs()).pow(exponent)
    return result.masked_fill(x == 0, 0.0) if exponent < 0 else result


def _divide_numbers(a: float, b: float) -> float:
    return a / b if b else 0.0


def power_of_number(x: float, exponent: float) -> float:
    """Return ``power`` of a plain number."""
    if x == 0:
        return 0.0
    return float((x if float(exponent).is_integer() else abs(x)) ** exponent)


def is_even_power(exponent: float) -> bool:
    """Whether x**exponent depends on |x| alone: an even or a fractional exponent."""
    return not float(exponent).is_integer() or exponent % 2 == 0


def _same(shape: Shape) -> Shape:
    if shape == SCALAR:
        raise SecateurError("expected an operand with more than one value, got a single number")
    return shape


def _always(_signs: tuple[bool, ...], _value: float | None) -> bool:
    return True


def _if_operands(signs: tuple[bool, ...], _value: float | None) -> bool:
    return all(signs)


def _infix(
    name: str, symbol: str, meaning: str, compute: Callable[..., Any], number: Callable[..., float]
) -> Operator:
    sign = never if name == "sub" else _if_operands
    return Operator(name, 2, "elementwise", meaning, compute, "", broadcast, sign, number, symbol)


def _unary(
    name: str,
    meaning: str,
    order: str,
    nonnegative: Callable[[tuple[bool, ...], float | None], bool],
    compute: Callable[..., Any],
    number: Callable[..., float],
    symbol: str = "",
) -> Operator:
    return Operator(name, 1, "elementwise", meaning, compute, order, broadcast, nonnegative, number, symbol)


def _reduction(axis: str, what: str) -> Operator:
    over = {"row": (1,), "col": (0,), "all": (0, 1)}[axis]

    def shape(operand: Shape) -> Shape:
        has = (operand.rows, operand.columns)
        if not any(has[i] for i in over):
            missing = {"row": "columns", "col": "rows", "all": "rows or columns"}[axis]
            raise SecateurError(f"expected an operand with {missing}, got one of shape {operand}")
        return Shape(operand.rows and 0 not in over, operand.columns and 1 not in over)

    compute: Callable[[Tensor], Tensor] = {
        "sum": lambda x: x.sum(over, keepdim=True),
        "mean": lambda x: x.mean(over, keepdim=True),
        "norm": lambda x: x.square().sum(over, keepdim=True).sqrt(),
        "max": lambda x: x.amax(over, keepdim=True),
    }[what]
    of = {"row": "each row", "col": "each column", "all": "the whole matrix"}[axis]
    text = {"norm": "Euclidean norm", "max": "maximum"}.get(what, what)
    sign = _always if what == "norm" else _if_operands
    return Operator(f"{axis}_{what}", 1, "reduction", f"{text} over {of}", compute, "", shape, sign)


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin((0, 1), keepdim=True), x.amax((0, 1), keepdim=True)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 1), keepdim=True), x.std((0, 1), correction=0, keepdim=True)


def _power_sign(signs: tuple[bool, ...], value: float | None) -> bool:
    return signs[0] or is_even_power(value or 0.0)


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        _infix("add", "+", "x + y", lambda a, b: a + b, lambda a, b: a + b),
        _infix("sub", "-", "x - y", lambda a, b: a - b, lambda a, b: a - b),
        _infix("mul", "*", "x * y", lambda a, b: a * b, lambda a, b: a * b),
        _infix("div", "/", "x / y, and 0 where y = 0", divide, _divide_numbers),
        _unary("pow", "x**c for a whole c, |x|**c for a fractional c, and 0 at x = 0 for a negative c",
               "magnitude", _power_sign, power, power_of_number, "**"),
        _unary("neg", "-x", "decreasing", never, lambda x: -x, lambda x: -x, "-"),
        _unary("abs", "|x|", "magnitude", _always, lambda x: x.abs(), abs),
        _unary("square", "x * x", "magnitude", _always, lambda x: x * x, lambda x: x * x),
        _unary("sqrt", "sqrt(|x|)", "magnitude", _always,
               lambda x: x.abs().sqrt(), lambda x: math.sqrt(abs(x))),
        _unary("log", f"log(|x| + {LOG_OFFSET:g})", "magnitude", never,
               lambda x: (x.abs() + LOG_OFFSET).log(), lambda x: math.log(abs(x) + LOG_OFFSET)),
        _unary("log1p", "log(1 + |x|)", "magnitude", _always,
               lambda x: x.abs().log1p(), lambda x: math.log1p(abs(x))),
        _unary("exp", f"exp(min(x, {EXP_LIMIT:g}))", "", _always,
               lambda x: x.clamp(max=EXP_LIMIT).exp(), lambda x: math.exp(min(x, EXP_LIMIT))),
        _unary("tanh", "tanh(x)", "increasing", _if_operands, lambda x: x.tanh(), math.tanh),
        _unary("sigmoid", "1 / (1 + exp(-x))", "increasing", _always,
               lambda x: x.sigmoid(), lambda x: 0.5 * (1 + math.tanh(0.5 * x))),
        Operator("minmax", 1, "normalisation",
                 "(x - min x) / (max x - min x) over the whole matrix, 0 if x is constant",
                 lambda x, low, high: divide(x - low, high - low),
                 "increasing", _same, _always, None, "", _extremes),
        Operator("zscore", 1, "normalisation",
                 "(x - mean x) / standard deviation of x over the whole matrix, 0 if x is constant",
                 lambda x, mean, deviation: divide(x - mean, deviation),
                 "increasing", _same, never, None, "", _moments),
        *(_reduction(axis, what) for axis in ("row", "col", "all")
          for what in ("sum", "mean", "norm", "max")),
    )
}  # fmt: skip

INFIX: dict[str, str] = {o.symbol: o.name for o in OPERATORS.values() if o.symbol and o.name != "neg"}


# What others may add ----------------------------------------------------------------------------

GRAM = "H"  # what leaves may be computed from beside other leaves
KINDS = ("elementwise", "reduction", "normalisation")
ORDERS = ("", "increasing", "decreasing", "magnitude")


def _admitted(operator: Operator, origin: str) -> Operator:
    """Return an operator of somebody else's, checked, with functions whose failures are sentences."""
    name, what = operator.name, f"the operator {operator.name} of {origin}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name == "const":
        raise SecateurError(f"expected an operator's name in small letters, such as cube, got {name!r}")
    if operator.kind not in KINDS or operator.order not in ORDERS:
        raise SecateurError(
            f"expected the kind of {name} among {', '.join(KINDS)} and its order among increasing, "
            f"decreasing, magnitude or empty, got {operator.kind!r} and {operator.order!r}"
        )
    if operator.symbol or operator.arity not in (1, 2, 3):
        raise SecateurError(f"expected {name} to be called by name with 1 to 3 operands")
    if operator.arity > 1 and (operator.kind != "elementwise" or operator.order):
        raise SecateurError(f"expected 1 operand for {name}, which is a {operator.kind} or has an order")
    if operator.kind == "reduction" and operator.order:
        raise SecateurError(f"expected no order for {name}: a reduction does not keep the weights apart")
    if (operator.kind == "normalisation") != (operator.statistics is not None):
        raise SecateurError(f"expected statistics for a normalisation and for nothing else, got {name}")
    shape = guarded(operator.shape, what, passing=ValueError)  # which says that there is no shape
    for operands in product((FULL, COLUMN, ROW, SCALAR), repeat=operator.arity):
        try:
            found = shape(*operands)
        except PluginError:
            raise
        except ValueError:
            continue
        if not isinstance(found, Shape):
            raise SecateurError(f"expected {name} to have a Shape for operands of {operands}, got {found!r}")
    sign = guarded(operator.nonnegative, what)
    return replace(
        operator,
        shape=shape,
        nonnegative=lambda signs, value: bool(sign(signs, value)),
        compute=_checked(operator, guarded(operator.compute, what, MetricError), what),
        number=operator.number and guarded(operator.number, what, MetricError),
        statistics=operator.statistics and guarded(operator.statistics, what, MetricError),
    )


def _checked(operator: Operator, compute: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return a tensor function that says when its result has not the shape that its operator declares."""

    def call(*tensors: Any) -> Any:
        found = compute(*tensors)
        operands = tensors[: operator.arity]
        rows, columns = (max(x.shape[axis] for x in operands) for axis in (0, 1))
        declared = operator.shape(*(Shape(x.shape[0] > 1, x.shape[1] > 1) for x in operands))
        wanted = (rows if declared.rows else 1, columns if declared.columns else 1)
        got = getattr(found, "shape", None)
        if min(rows, columns) > 1 and got != wanted:
            shape = tuple(got) if got is not None else type(found).__name__
            raise MetricError(f"{what} fails: expected a tensor of {wanted}, got {shape}")
        return found

    return call


def _admitted_leaf(leaf: Leaf, origin: str) -> Leaf:
    """Return a leaf of somebody else's, checked, with a function whose failures are sentences."""
    name = leaf.name
    if not re.fullmatch(r"[A-Z][A-Za-z0-9_]*", name) or keyword.iskeyword(name) or name == GRAM:
        raise SecateurError(f"expected a leaf's name with a capital first, such as S, got {name!r}")
    if not isinstance(leaf.shape, Shape) or leaf.compute is None:
        raise SecateurError(f"expected a shape such as COLUMN and a function compute for the leaf {name}")
    held = [GRAM, *(known for known, other in LEAVES.items() if other.compute is None)]
    if other := [n for n in leaf.needs if n not in held]:
        raise SecateurError(f"expected {name} to need some of {', '.join(held)}, got {other[0]!r}")
    return replace(leaf, compute=guarded(leaf.compute, f"the leaf {name} of {origin}", MetricError))


open_table(OPERATORS, Operator, "an operator", "operators", _admitted)
open_table(LEAVES, Leaf, "a leaf", "leaves", _admitted_leaf)
