"""Order forms: one expression for all those that order a group's weights alike.

A mask depends on the order of the scores alone, so what changes no order falls away, such as an increasing
function or a positive factor at the root.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

from .canonical import NotFiniteError, canonical, factors_of, product_of, scaled, terms_of, unit_sum
from .expression import Expression, MetricError, constant
from .operators import OPERATORS, SCALAR

Group = Literal["row", "layer"]
GROUPS: tuple[Group, ...] = get_args(Group)


@lru_cache(maxsize=65536)
def order_form(expression: Expression, group: str) -> Expression:
    """Return the simplest form that orders the weights of each group as the expression does.

    Two metrics with one order form have one mask at every ratio; the evaluator scores the order form.
    A factor that is constant within a group and never negative is taken for positive: where it is
    0 the expression orders nothing and the form decides.

    Args:
        expression: A metric.
        group: The weights that compete: ``row`` or ``layer``.
    """
    form = canonical(expression)
    try:
        while (simpler := _peel(form, group)) != form:
            form = simpler
    except (NotFiniteError, MetricError, OverflowError):
        pass  # a constant or exponent would leave its range: the form so far is as good
    return form


def _constant_in(e: Expression, group: str) -> bool:
    """Whether all weights of a group share the value of e."""
    return not e.shape.columns if group == "row" else e.shape == SCALAR


def _peel(e: Expression, group: str) -> Expression:
    if e.op in ("add", "sub"):
        _, terms = terms_of(e)
        kept = {t: c for t, c in terms.items() if not _constant_in(t, group)}
        if not kept:
            return constant(0.0)
        return canonical(unit_sum(0.0, kept, turn=False)[1])
    coefficient, factors = factors_of(e)
    if not factors or coefficient == 0:
        return constant(0.0)
    kept = {b: p for b, p in factors.items() if not (b.nonnegative and _constant_in(b, group))}
    sign = math.copysign(1.0, coefficient)
    if not kept:
        return constant(0.0)
    if len(set(kept.values())) == 1 and all(b.nonnegative for b in kept):
        exponent = next(iter(kept.values()))  # |a|**p * |b|**p orders as |a| * |b| does
        kept = dict.fromkeys(kept, 1.0) if exponent > 0 else kept
    if len(kept) == 1:
        ((base, exponent),) = kept.items()
        if exponent == 1:
            return canonical(scaled(_increasing(base), sign))
    return canonical(product_of(sign, kept))


def _increasing(e: Expression) -> Expression:
    """Strip one function that keeps the order within a group."""
    if not e.args:
        return e
    operator = OPERATORS[e.op]
    if operator.order == "increasing":
        return e.args[0]
    if operator.order == "decreasing":
        return canonical(Expression("neg", e.args))
    if operator.order == "magnitude" and e.value is None:  # of a power it depends on the exponent
        return canonical(Expression("abs", e.args))
    return e
