"""Writing expressions: the text that `parse` reads back to the same tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .operators import OPERATORS

if TYPE_CHECKING:
    from .expression import Expression

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

    if len(args) == 2:
        strength = _STRENGTH[op]  # both associate to the left, so an equal on the right is wrapped
        return f"{operand(0, strength)} {OPERATORS[op].symbol} {operand(1, strength + 1)}"
    if op == "pow":
        assert expression.value is not None
        return f"{operand(0, _ATOM)}**{number_text(expression.value)}"
    if op == "neg" and args[0].op != "const":  # -2 is the constant, neg(2) the operation
        return f"-{operand(0, _STRENGTH['pow'])}"
    return f"{op}({to_text(args[0])})"
