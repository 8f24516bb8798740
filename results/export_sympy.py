"""A metric for sympy: text that ``sympy.sympify`` reads back, with no names of ours to import.

Leaves become symbols, operators that sympy has become sympy's, and reductions and normalisations become
functions that it does not know, such as ``row_sum(Abs(W))``. Divisions are plain ones: the values are ours
wherever no divisor is 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..metrics_dsl.expression import Expression
from ..metrics_dsl.operators import EXP_LIMIT
from .finding import Finding


def to_sympy(expression: Expression) -> Any:
    """Return an expression of sympy, as sympy's own automatic simplification leaves it."""
    import sympy

    def number(value: float) -> Any:
        return sympy.Integer(int(value)) if value.is_integer() else sympy.Float(repr(value))

    def convert(e: Expression) -> Any:
        if e.op == "const":
            assert e.value is not None
            return number(e.value)
        if not e.args:
            return sympy.Symbol(e.op)
        x, *others = (convert(arg) for arg in e.args)
        if e.op == "pow":
            assert e.value is not None
            return (x if e.value.is_integer() else sympy.Abs(x)) ** number(e.value)
        if others:
            y = others[0]
            return {"add": x + y, "sub": x - y, "mul": x * y, "div": x / y if y != 0 else 0}[e.op]
        known = {
            "neg": lambda: -x,
            "abs": lambda: sympy.Abs(x),
            "square": lambda: x**2,
            "sqrt": lambda: sympy.sqrt(sympy.Abs(x)),
            "log": lambda: sympy.log(sympy.Abs(x) + sympy.Rational(1, 1000)),
            "log1p": lambda: sympy.log(1 + sympy.Abs(x)),
            "exp": lambda: sympy.exp(sympy.Min(x, number(EXP_LIMIT))),
            "tanh": lambda: sympy.tanh(x),
            "sigmoid": lambda: 1 / (1 + sympy.exp(-x)),
        }
        return known[e.op]() if e.op in known else sympy.Function(e.op)(x)

    return convert(expression)


def write_sympy(finding: Finding, path: Path) -> None:
    """Write the metric as one line."""
    import sympy

    path.write_text(sympy.sstr(to_sympy(finding.candidate.metric), full_prec=False) + "\n")
