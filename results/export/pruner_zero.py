"""Trees of Pruner-Zero: a metric as their JSON {data, left, right}, and theirs as a metric.

Their released code (pprp/Pruner-Zero @ db70134, lib/gptree.py) passes W as |W|, X as the squared norm of an
input's activations divided by the number of sequences, and G as the square root of the sum of squares of 100
times the gradients. With their protocol of 128 sequences of 2048 tokens

    W = |W|        X = 2048 * X**2        G = 100 * sqrt(128) * G

in terms of ours, and their operators are

    div(x, y) = x / ||y||, y broadcast to x before          pow, sqr = x * x       skp = x
    mms, zsn = over the whole tensor                        log = log(|x| + 0.001), sqrt = sqrt(|x|)

Factors that no order depends on are left out where a tree is read, so ``mul(abs(mul(W, W)), mms(G))`` is
``abs(abs(W) * abs(W)) * minmax(G)``: the same order in real arithmetic, though their tanh may saturate where
ours does not. Two operators differ at their edges: their exp clamps at 100 where ours does at 80, and their
zsn divides by the deviation with n - 1, which is a positive factor near 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...metrics_dsl.expression import Expression, MetricError, check_metric, constant
from ...metrics_dsl.operators import FULL
from ...metrics_dsl.order import GROUPS, order_form
from ...search.core.reading import Given, read_json
from .candidate_record import CandidateRecord, ExportError

SEQUENCES, TOKENS, GRADIENT_FACTOR = 128, 2048, 100.0  # of their protocol
# Their operator -> ours, with one operand
_UNARY = {
    "sqr": "square", "pow": "square", "neg": "neg", "abs": "abs", "log": "log", "exp": "exp", "sqrt": "sqrt",
    "tanh": "tanh", "mms": "minmax", "zsn": "zscore",
}  # fmt: skip
_BINARY = ("add", "sub", "mul")
_THEIRS = {ours: theirs for theirs, ours in _UNARY.items() if theirs != "pow"}
_FACTORS = {"G": GRADIENT_FACTOR * SEQUENCES**0.5, "X": float(TOKENS)}
# Their leaf -> ours, but for the factor
_LEAVES = {
    "W": Expression("abs", (Expression("W"),)),
    "G": Expression("G"),
    "X": Expression("square", (Expression("X"),)),
}


def read_pruner_zero(path: Path) -> Expression:
    """Return the metric of a tree in a JSON file.

    Raises:
        ExportError: When the file is no such tree, or the tree scores no weights.
    """
    return _metric(read_json(path, "a tree of Pruner-Zero as JSON", ExportError))


def from_tree(tree: Any) -> Expression:
    """Return the metric of a tree, in our units: without their factors where these change no order."""
    return _metric(Given(tree, "the tree", ExportError))


def _metric(tree: Given) -> Expression:
    try:
        plain = check_metric(_read(tree, {}))
        scaled = _read(tree, _FACTORS)
    except (MetricError, RecursionError) as error:
        raise ExportError(f"{tree.source} is no metric: {error}") from None
    is_same = all(order_form(plain, group) == order_form(scaled, group) for group in GROUPS)
    return plain if is_same else scaled


def _read(node: Given, factors: dict[str, float]) -> Expression:
    members = node.members("a tree of nodes {data, left, right}")
    name = node.field("data").text("the name of a leaf or an operator")
    if name in _LEAVES:
        return _in_their_units(name) if name in factors else _LEAVES[name]
    if name not in ("div", "skp", *_UNARY, *_BINARY):
        raise members["data"].refused("what Pruner-Zero's released code knows")
    sides = ("left", "right") if name in ("div", *_BINARY) else ("left",)
    operands = tuple(_read(node.field(side), factors) for side in sides)
    if name == "skp":
        return operands[0]
    if name == "div":
        x, y = operands if operands[0].shape == operands[1].shape else map(_spread, operands)
        return Expression("div", (x, Expression("all_norm", (y,))))
    return Expression(name if name in _BINARY else _UNARY[name], operands)


def to_tree(metric: Expression, group: str = "row") -> dict[str, Any]:
    """Return the tree of a metric: equal scores up to a positive factor, or those of its order form.

    Raises:
        ExportError: When their operators or units cannot express it.
    """
    form = order_form(metric, group)
    try:
        tree = _write(metric)
    except ExportError:
        if form == metric:
            raise
        try:
            tree = _write(form)
        except ExportError:
            tree = _write(metric)  # what is wrong is said of what the user wrote
    if order_form(from_tree(tree), group) != form:
        reason = "their G and X have other units and their div spreads a column, which its order depends on"
        if not _is_even_in_weights(metric, group):
            reason = "their W is |W|"
        raise ExportError(f"Pruner-Zero cannot express `{metric}`: {reason}")
    return tree


def _in_their_units(leaf: str) -> Expression:
    return Expression("mul", (constant(_FACTORS[leaf]), _LEAVES[leaf]))


_NOTHING = Expression("mul", (constant(0.0), _LEAVES["W"]))


def _spread(e: Expression) -> Expression:
    """Return e over all rows and columns, for their div takes the norm of what has been broadcast."""
    return e if e.shape == FULL else Expression("add", (e, _NOTHING))


def _is_even_in_weights(metric: Expression, group: str) -> bool:
    def magnitudes(e: Expression) -> Expression:
        if not e.args:
            return Expression("abs", (e,)) if e.op == "W" else e
        return Expression(e.op, tuple(map(magnitudes, e.args)), e.value)

    return order_form(magnitudes(metric), group) == order_form(metric, group)


def _node(name: str, *operands: dict[str, Any]) -> dict[str, Any]:
    return {"data": name, **dict(zip(("left", "right"), operands, strict=False))}


def _write(e: Expression) -> dict[str, Any]:
    for name, leaf in _LEAVES.items():
        if e == leaf or (name in _FACTORS and e == _in_their_units(name)):
            return _node(name)
    if e.op == "add" and e.args[1] == _NOTHING:
        return _write(e.args[0])
    if e.op == "W":  # of their own sign, which the caller checks
        return _node("W")
    if e.op == "X":
        return _node("sqrt", _node("X"))
    if e.op == "const":
        raise ExportError(f"Pruner-Zero has no numbers, and the metric has {e}")
    if not e.args:
        raise ExportError(f"Pruner-Zero has the leaves W, G and X, and the metric has {e.op}")
    if e.op == "div":
        if e.args[1].op == "all_norm":
            return _node("div", _write(e.args[0]), _write(e.args[1].args[0]))
        raise ExportError(
            f"Pruner-Zero divides by the norm of a whole tensor alone, and the metric by {e.args[1]}"
        )
    if e.op == "pow" and e.value in (3.0, 4.0):
        square = _node("sqr", _write(e.args[0]))
        return _node("sqr", square) if e.value == 4 else _node("mul", square, _write(e.args[0]))
    if e.op not in (*_THEIRS, *_BINARY):
        what = f"the exponent {e.value:g}" if e.op == "pow" else f"the operator {e.op}"
        raise ExportError(f"Pruner-Zero does not have {what}")
    return _node(_THEIRS.get(e.op, e.op), *map(_write, e.args))


def write_pruner_zero(record: CandidateRecord, path: Path) -> None:
    """Write the tree of a candidate's metric, as their ``GPTree.load_tree`` reads it."""
    tree = json.dumps(to_tree(record.candidate.metric, record.candidate.group), indent=4)
    path.write_text(tree, encoding="utf-8")
