"""Reading metrics from text. Nothing is ever evaluated as Python: only the syntax tree is read."""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Iterable

from .canonical import canonical
from .expression import MAX_DEPTH, Expression, MetricError, check_metric, constant
from .operators import LEAVES, OPERATORS
from .plugins import fill

MAX_LENGTH = 2000
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_+\-*/^().,\s]")
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'sqrt'?"`` for the nearest known name, else what is known."""
    names = list(known)
    folded = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[close[0]]!r}?" if close else f"; known are {', '.join(names)}"


def parse(text: str) -> Expression:
    """Return the expression that a text such as ``abs(W) * X**1.2`` stands for.

    Infix ``+ - * / **`` (``^`` is read as ``**``), unary minus, numbers, leaves and operators called by
    name. The result prints back: ``parse(str(parse(text))) == parse(text)``.

    Raises:
        MetricError: With the column of the mistake and what was expected there.
    """
    if not isinstance(text, str):
        raise MetricError(f"expected a metric as text, got {type(text).__name__}")
    if not text.strip():
        raise MetricError("expected a metric such as `abs(W) * X`, got an empty text")
    if len(text) > MAX_LENGTH:
        raise MetricError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    if found := _FORBIDDEN.search(text):
        raise _mistake(found.start(), f"the character {found[0]!r} is not part of the language")
    _check_parentheses(text)
    source, origin = "", []  # the text for Python's parser, and where each character came from
    for position, character in enumerate(text):
        if source or not character.isspace():
            piece = "**" if character == "^" else " " if character.isspace() else character
            source += piece
            origin += [position] * len(piece)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own hints, such as "'int' is not callable"
            tree = ast.parse(source.rstrip(), mode="eval").body
    except SyntaxError as error:
        where = min((error.offset or len(origin)) - 1, len(origin) - 1)  # 0 is the end
        raise _mistake(origin[where], "the expression is not complete or not valid here") from None
    except (RecursionError, MemoryError, ValueError):
        raise MetricError(f"expected at most {MAX_DEPTH} levels of nesting") from None
    return _Reader(source, origin).read(tree, 1)


def parse_metric(text: str) -> Expression:
    """Return the expression of a text that can be used as a pruning metric.

    Raises:
        MetricError: When the text cannot be parsed, or does not give each weight a score of its own:
            a shape other than (rows, columns), before or after simplification.
    """
    expression = check_metric(parse(text))
    simple = canonical(expression)
    if simple != expression:
        try:
            check_metric(simple)
        except MetricError as error:
            raise MetricError(f"`{expression}` simplifies to `{simple}`; {error}") from None
    return expression


def _mistake(column: int, message: str) -> MetricError:
    return MetricError(f"column {column + 1}: {message}")


def _check_parentheses(text: str) -> None:
    open_at: list[int] = []
    for position, character in enumerate(text):
        if character == "(":
            open_at.append(position)
            if len(open_at) > MAX_DEPTH:
                raise _mistake(position, f"expected at most {MAX_DEPTH} levels of parentheses")
        elif character == ")":
            if not open_at:
                raise _mistake(position, "this ')' closes nothing; remove it or add a '('")
            open_at.pop()
    if open_at:
        raise _mistake(open_at[-1], "this '(' is never closed; add a ')'")


class _Reader:
    """Turns nodes of Python's syntax tree into expressions, refusing every other node."""

    def __init__(self, source: str, origin: list[int]) -> None:
        self._source = source
        self._origin = origin

    def read(self, node: ast.expr, level: int) -> Expression:
        if level > MAX_DEPTH:
            raise self._mistake(node, f"expected at most {MAX_DEPTH} levels of nesting")
        try:
            return self._read(node, level)
        except MetricError as error:
            if str(error).startswith("column "):
                raise
            raise self._mistake(node, str(error)) from None

    def _read(self, node: ast.expr, level: int) -> Expression:
        if isinstance(node, ast.Constant):
            return constant(self._number(node))
        if isinstance(node, ast.Name):
            return self._leaf(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            if isinstance(node.op, ast.UAdd):
                return self.read(node.operand, level + 1)
            if isinstance(node.operand, ast.Constant):
                return constant(-self._number(node.operand))
            return Expression("neg", (self.read(node.operand, level + 1),))
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return self._apply(_BINARY[type(node.op)], [node.left, node.right], level)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node, node.func.id, level)
        raise self._mistake(node, "expected numbers, leaves, + - * / ** and operators by name")

    def _call(self, node: ast.Call, name: str, level: int) -> Expression:
        if name not in OPERATORS:
            fill(OPERATORS, LEAVES)
        if name in LEAVES:
            raise self._mistake(node, f"{name} is a leaf, not an operator; write {name} * (...)")
        if name not in OPERATORS:
            raise self._mistake(node, f"unknown operator {name!r}{did_you_mean(name, OPERATORS)}")
        expected = 2 if name == "pow" else OPERATORS[name].arity
        if len(node.args) != expected:
            raise self._mistake(node, f"{name} takes {expected} operand(s), got {len(node.args)}")
        return self._apply(name, node.args, level)

    def _apply(self, name: str, operands: list[ast.expr], level: int) -> Expression:
        if name == "pow":
            return Expression("pow", (self.read(operands[0], level + 1),), self._exponent(operands[1]))
        return Expression(name, tuple(self.read(operand, level + 1) for operand in operands))

    def _leaf(self, node: ast.Name) -> Expression:
        if node.id not in LEAVES:
            fill(OPERATORS, LEAVES)
        if node.id in OPERATORS:
            raise self._mistake(node, f"{node.id} is an operator; write {node.id}(...)")
        if node.id not in LEAVES:
            raise self._mistake(node, f"unknown leaf {node.id!r}{did_you_mean(node.id, LEAVES)}")
        return Expression(node.id)

    def _exponent(self, node: ast.expr) -> float:
        sign = 1.0
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = -1.0, node.operand
        if not isinstance(node, ast.Constant):
            raise self._mistake(node, "expected a number as exponent, as in X**1.2")
        return sign * self._number(node)

    def _number(self, node: ast.Constant) -> float:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise self._mistake(node, f"expected a real number, got {node.value!r}")
        written = self._source[node.col_offset : node.end_col_offset]
        if not _NUMBER.fullmatch(written):
            raise self._mistake(node, f"expected a number such as 0.5 or 1e-3, got {written}")
        try:
            return float(node.value)
        except OverflowError:
            raise self._mistake(node, "expected a finite number, got one too large") from None

    def _mistake(self, node: ast.expr, message: str) -> MetricError:
        return _mistake(self._origin[node.col_offset], message)
