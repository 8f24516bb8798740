r"""A metric as a formula: LaTeX in the notation of the field, and text for sympy.

LaTeX has indices: :math:`|W_{ij}| \Vert X_j \Vert`. The text for ``sympy.sympify`` has no names of ours to
import: leaves become symbols, operators that sympy has become sympy's, and reductions, normalisations and
what others add become functions that it does not know, such as ``row_sum(Abs(W))``. Divisions are plain
ones: the values are ours wherever no divisor is 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...metrics_dsl.expression import Expression, number_text
from ...metrics_dsl.operators import EXP_LIMIT, LEAVES, LOG_OFFSET, OPERATORS
from ...metrics_dsl.plugins import origin_of
from .candidate_record import CandidateRecord
from .python_file import in_a_line

# Leaf -> (symbol with {i} and {j} for its row and column, what it is)
LEAF_SYMBOLS = {
    "W": (r"W_{{{i}{j}}}", "weight of output i and input j"),
    "G": (r"\Vert G_{{{i}{j}}} \Vert", "root-mean-square gradient over sequences"),
    "X": (r"\Vert X_{{{j}}} \Vert", "root-mean-square of input j over tokens"),
    "M": (r"\mu_{{{j}}}", "mean of input j over tokens"),
    "V": (r"\sigma_{{{j}}}^2", "variance of input j over tokens"),
    "D": (r"[H^{{-1}}]_{{{j}{j}}}", "diagonal of the damped inverse Gram matrix of the inputs"),
    "Y": (r"\Vert Y_{{{i}}} \Vert", "root-mean-square of output i over tokens"),
}
_ATOMS = "WGXMY"  # those whose symbol takes an exponent without brackets
_SUM, _PRODUCT, _POWER, _ATOM = 1, 2, 3, 4  # how strongly a piece binds


def to_latex(expression: Expression) -> str:
    """Return the formula of an expression, without a surrounding environment."""
    return _latex(expression, "i", "j")[0]


def _wrapped(piece: tuple[str, int], weakest: int) -> str:
    text, strength = piece
    return text if strength >= weakest else rf"\left( {text} \right)"


def _bars(e: Expression, i: str, j: str) -> str:
    text = _latex(e, i, j)[0]
    return text if e.nonnegative else rf"\left| {text} \right|"


def _latex(e: Expression, i: str, j: str) -> tuple[str, int]:
    """Return the text of a node at row i and column j, and how strongly it binds."""
    if e.op == "const":
        assert e.value is not None
        text = number_text(e.value)
        if "e" in text:
            mantissa, _, exponent = text.partition("e")
            text = rf"{mantissa} \cdot 10^{{{int(exponent)}}}"
        return text, _ATOM if e.value >= 0 and "10^" not in text else _SUM
    if not e.args:
        return symbol_of(e.op, i, j), _ATOM if e.op in _ATOMS else _POWER
    if origin_of(OPERATORS, e.op):
        return _added(e, [_latex(arg, i, j)[0] for arg in e.args]), _ATOM
    axis, _, what = e.op.partition("_")
    if what:
        return _reduction(e.args[0], axis, what, i, j)
    x = _latex(e.args[0], i, j)
    if e.op in ("add", "sub"):
        y = _latex(e.args[1], i, j)
        symbol = "+" if e.op == "add" else "-"
        return f"{x[0]} {symbol} {_wrapped(y, _SUM if e.op == 'add' and y[0][0] != '-' else _PRODUCT)}", _SUM
    if e.op == "mul":
        return rf"{_wrapped(x, _PRODUCT)} \cdot {_wrapped(_latex(e.args[1], i, j), _POWER)}", _PRODUCT
    if e.op == "div":
        return rf"\frac{{{x[0]}}}{{{_latex(e.args[1], i, j)[0]}}}", _PRODUCT
    if e.op == "neg":
        return f"-{_wrapped(x, _PRODUCT)}", _SUM
    if e.op in ("square", "pow"):
        power = 2.0 if e.value is None else e.value
        is_bare = power.is_integer() or e.args[0].nonnegative
        base = _wrapped(x, _ATOM) if is_bare else _bars(e.args[0], i, j)
        return f"{base}^{{{number_text(power)}}}", _POWER
    return _function(e, x[0], i, j), _ATOM


def _added(e: Expression, operands: list[str]) -> str:
    """Return the formula that an operator of somebody else's has, or its name before its operands."""
    if template := OPERATORS[e.op].latex:
        return template.format(*operands)
    name = e.op.replace("_", r"\_")
    return rf"\operatorname{{{name}}}\left( {', '.join(operands)} \right)"


def symbol_of(leaf: str, i: str = "i", j: str = "j") -> str:
    """Return the symbol of a leaf at row i and column j."""
    if leaf in LEAF_SYMBOLS:
        return LEAF_SYMBOLS[leaf][0].format(i=i, j=j)
    if own := LEAVES[leaf].latex:
        return own.format(i=i, j=j)
    index = i * LEAVES[leaf].shape.rows + j * LEAVES[leaf].shape.columns
    name = leaf.replace("_", r"\_")
    return rf"\mathrm{{{name}}}" + (f"_{{{index}}}" if index else "")


def _function(e: Expression, x: str, i: str, j: str) -> str:
    bars = _bars(e.args[0], i, j)
    return {
        "abs": rf"\left| {x} \right|",
        "sqrt": rf"\sqrt{{{bars}}}",
        "log": rf"\log\left( {bars} + {LOG_OFFSET:g} \right)",
        "log1p": rf"\log\left( 1 + {bars} \right)",
        "exp": rf"\exp\left( \min\left( {x}, {EXP_LIMIT:g} \right) \right)",
        "tanh": rf"\tanh\left( {x} \right)",
        "sigmoid": rf"\sigma\left( {x} \right)",
        "minmax": rf"\operatorname{{minmax}}\left( {x} \right)",
        "zscore": rf"\operatorname{{zscore}}\left( {x} \right)",
    }[e.op]


def _reduction(operand: Expression, axis: str, what: str, i: str, j: str) -> tuple[str, int]:
    """Return a sum, mean, norm or maximum, over indices with one more prime than outside."""
    over_rows = axis in ("col", "all") and operand.shape.rows
    over_columns = axis in ("row", "all") and operand.shape.columns
    inner_i, inner_j = i + "'" * over_rows, j + "'" * over_columns
    inside = _latex(operand, inner_i, inner_j)
    index = ", ".join([inner_i] * over_rows + [inner_j] * over_columns)
    if what == "norm":
        base = _wrapped(inside, _ATOM)
        return rf"\sqrt{{\sum_{{{index}}} {base}^2}}", _ATOM
    operator = {"sum": r"\sum", "mean": r"\operatorname{mean}", "max": r"\max"}[what]
    return rf"{operator}_{{{index}}} {_wrapped(inside, _POWER)}", _SUM if what == "sum" else _PRODUCT


def write_latex(record: CandidateRecord, path: Path) -> None:
    """Write the formula, and what its symbols are as comments."""
    metric = record.candidate.metric
    meanings = {name: LEAVES[name].meaning for name in LEAVES if name in metric.leaves}
    meanings |= {name: what for name, (_, what) in LEAF_SYMBOLS.items() if name in meanings}
    lines = [f"% {symbol_of(name)}: {in_a_line(meaning)}" for name, meaning in meanings.items()]
    text = "\n".join([*lines, f"S_{{ij}} = {to_latex(metric)}"]) + "\n"
    path.write_text(text, encoding="utf-8")


# sympy -----------------------------------------------------------------------------------------


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
        if origin_of(OPERATORS, e.op):
            return sympy.Function(e.op)(x, *others)
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


def write_sympy(record: CandidateRecord, path: Path) -> None:
    """Write the metric as one line."""
    import sympy

    path.write_text(sympy.sstr(to_sympy(record.candidate.metric), full_prec=False) + "\n", encoding="utf-8")
