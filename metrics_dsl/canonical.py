"""Canonical forms: one expression for all those that have the same value in real arithmetic.

Sums are kept as ``{term: coefficient}`` and products as ``{base: exponent}``. A base of known sign may
have any exponent; the sign of any other base is kept as that base to the power 1, its magnitude
as ``abs(base)`` to the rest. Protected division makes 0 * 0**-n = 0, so exponents of one base
simply add up; a sum of 0 is kept, for x / x is 0 where x is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from .expression import Expression, MetricError, constant
from .operators import OPERATORS, SCALAR, is_even_power, power_of_number

_RANK = {name: rank for rank, name in enumerate("WGXMVYD")}
# Of these the algebra below is known; of what others add, what their rows say.
_NORMALISATIONS = ("minmax", "zscore")
_REDUCTIONS = frozenset(f"{axis}_{what}" for axis in ("row", "col", "all")
                        for what in ("sum", "mean", "norm", "max"))  # fmt: skip
_Factors = dict[Expression, float]


class NotFiniteError(ArithmeticError):
    """A constant left the range of floats while being folded; the operation is kept as written."""


def _tidy(value: float) -> float:
    """Round off the noise of folding (0.1 + 0.2), so that equal constants are equal."""
    if not math.isfinite(value):
        raise NotFiniteError
    return float(f"{value:.12g}")


def unit_sum(number: float, terms: dict[Expression, float], *, turn: bool = True) -> tuple[float, Expression]:
    """Return (unit, sum / unit) such that the smallest coefficient is 1 or -1.

    With ``turn`` the leading term's coefficient is made positive. Ratios keep two digits less than
    constants, so that multiplying by the unit and dividing again gives the same ratio.
    """
    unit = min(map(abs, terms.values()))
    if turn and terms[min(terms, key=_sort_key)] < 0:
        unit = -unit

    def ratio(value: float) -> float:
        return float(f"{_tidy(value / unit):.10g}")

    return unit, _sum(ratio(number), {term: ratio(c) for term, c in terms.items()})


def _sort_key(expression: Expression) -> tuple[int, int, str]:
    """Weights first, then gradients, then activations, then what others add: the order people write in."""
    rank = min((_RANK.get(leaf, len(_RANK)) for leaf in expression.leaves), default=len(_RANK))
    return rank, expression.size, str(expression)


@lru_cache(maxsize=65536)
def canonical(expression: Expression) -> Expression:
    """Return the canonical form: equal in value, idempotent, and the same however it was written."""
    if not expression.args:
        return expression
    args = tuple(canonical(arg) for arg in expression.args)
    rebuilt = (
        Expression(expression.op, args, expression.value) if _shapes_kept(expression, args) else expression
    )
    try:
        return _simplify(rebuilt)
    except (NotFiniteError, MetricError, OverflowError):
        return rebuilt


def _shapes_kept(expression: Expression, args: tuple[Expression, ...]) -> bool:
    """Whether a reduction still sees the axes it saw: ``col_sum(W * 0 + X)`` is not ``col_sum(X)``."""
    if OPERATORS[expression.op].kind == "elementwise":
        return True
    return all(new.shape == old.shape for new, old in zip(args, expression.args, strict=True))


def _simplify(e: Expression) -> Expression:
    if e.op in ("add", "sub"):
        return _sum(*terms_of(e))
    if e.op in ("mul", "div", "neg", "pow", "square", "sqrt", "abs"):
        return product_of(*factors_of(e))
    if e.op in _REDUCTIONS:
        return _reduction(e, e.args[0])
    if e.op in _NORMALISATIONS:
        return _normalisation(e, e.args[0])
    number = OPERATORS[e.op].number
    if number is not None and all(arg.op == "const" for arg in e.args):
        return constant(_tidy(number(*(arg.value for arg in e.args))))
    if e.op in ("log", "log1p"):
        return Expression(e.op, (_magnitude(e.args[0]),))
    return e


# Products ---------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)  # callers copy what they change
def factors_of(e: Expression) -> tuple[float, _Factors]:
    """Take a canonical expression, or an operation on canonical ones, apart as a product."""
    if e.op == "const":
        assert e.value is not None
        return e.value, {}
    if e.op == "neg":
        coefficient, factors = factors_of(e.args[0])
        return -coefficient, factors
    if e.op in ("add", "sub"):
        number, terms = terms_of(e)
        if not terms:
            return number, {}
        unit, whole = unit_sum(number, terms)
        return (unit, {whole: 1.0}) if whole.op in ("add", "sub") else _scale(factors_of(whole), unit)
    if e.op == "mul":
        return _multiply(factors_of(e.args[0]), factors_of(e.args[1]))
    if e.op == "div":
        return _multiply(factors_of(e.args[0]), _raise(factors_of(e.args[1]), -1.0))
    exponent = {"abs": 1.0, "square": 2.0, "sqrt": 0.5, "pow": e.value}.get(e.op)
    if exponent is None or (e.op == "abs" and _is_atom(e.args[0])):
        return 1.0, {e: 1.0}
    coefficient, factors = factors_of(e.args[0])
    if e.op in ("abs", "sqrt") or is_even_power(exponent):
        factors = _magnitudes(factors)
        coefficient = abs(coefficient)
    return _raise((coefficient, factors), exponent)


def _is_atom(e: Expression) -> bool:
    """Whether abs(e) is a base of its own: e is no product and of no known sign."""
    return not e.nonnegative and factors_of(e) == (1.0, {e: 1.0})


def _magnitude_base(base: Expression) -> Expression:
    """Return abs(base), for a base that is a factor of a product."""
    return base if base.nonnegative else Expression("abs", (base,))


def _magnitudes(factors: _Factors) -> _Factors:
    result: _Factors = {}
    for base, exponent in factors.items():
        magnitude = _magnitude_base(base)
        result[magnitude] = _tidy(result.get(magnitude, 0.0) + exponent)
    return result


def _put(factors: _Factors, base: Expression, exponent: float) -> None:
    """Multiply by base**exponent, which has a whole exponent if the base's sign is not known."""
    if not base.nonnegative:
        total = factors.pop(base, 0.0) + exponent
        if total % 2 == 1:
            factors[base] = 1.0
        exponent = total - total % 2
        if exponent == 0:
            return
        base = _magnitude_base(base)
    factors[base] = _tidy(factors.get(base, 0.0) + exponent)


def _multiply(a: tuple[float, _Factors], b: tuple[float, _Factors]) -> tuple[float, _Factors]:
    factors = dict(a[1])
    for base, exponent in b[1].items():
        _put(factors, base, exponent)
    return _tidy(a[0] * b[0]), factors


def _scale(product: tuple[float, _Factors], by: float) -> tuple[float, _Factors]:
    return _tidy(product[0] * by), product[1]


def _raise(product: tuple[float, _Factors], exponent: float) -> tuple[float, _Factors]:
    factors: _Factors = {}
    for base, old in product[1].items():
        _put(factors, base, old * exponent)
    return _tidy(power_of_number(product[0], exponent)), factors


def _power(base: Expression, exponent: float) -> Expression:
    """Return base**exponent for a base of known sign and a positive exponent."""
    if exponent == 1:
        return base
    inner = base.args[0] if base.op == "abs" and is_even_power(exponent) else base
    if exponent in (2, 0.5):
        return Expression("square" if exponent == 2 else "sqrt", (inner,))
    return Expression("pow", (inner,), exponent)


def product_of(coefficient: float, factors: _Factors) -> Expression:
    """Return a coefficient times powers, as one expression."""
    coefficient = _tidy(coefficient)
    if coefficient == 0 or not factors:
        return constant(coefficient)
    if len(factors) == 1:
        ((base, exponent),) = factors.items()
        if exponent == 1 and base.op in ("add", "sub", "neg"):
            number, terms = terms_of(base)
            if coefficient == 1:
                return base
            return _sum(number * coefficient, {t: c * coefficient for t, c in terms.items()})
    above: list[Expression] = []
    below: list[Expression] = []
    pending = dict(factors)
    for base in [b for b in factors if not b.nonnegative]:  # signs: W * |W|**2 is written W**3
        rest = pending.get(_magnitude_base(base), 0.0)
        if rest and rest % 2 == 0 and _magnitude_base(base).args == (base,):
            del pending[base], pending[_magnitude_base(base)]
            power = rest + 1
            written = base if abs(power) == 1 else Expression("pow", (base,), abs(power))
            (above if power > 0 else below).append(written)
    for base, exponent in pending.items():
        if exponent >= 0:
            above.append(_power(base, exponent or 1.0))
        if exponent <= 0:
            below.append(_power(base, -exponent or 1.0))
    above.sort(key=_sort_key)
    negative = coefficient == -1 and bool(above)
    if (abs(coefficient) != 1 or not above) and coefficient != 0:
        above.insert(0, constant(coefficient))
    result = _chain("mul", above)
    if below:
        result = Expression("div", (result, _chain("mul", sorted(below, key=_sort_key))))
    return Expression("neg", (result,)) if negative else result


def _chain(op: str, operands: Iterable[Expression]) -> Expression:
    first, *rest = operands
    for operand in rest:
        first = Expression(op, (first, operand))
    return first


# Sums -------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)  # callers copy what they change
def terms_of(e: Expression) -> tuple[float, dict[Expression, float]]:
    """Take a canonical expression, or an operation on canonical ones, apart as a sum."""
    if e.op in ("add", "sub"):
        number, terms = terms_of(e.args[0])
        terms = dict(terms)
        sign = 1.0 if e.op == "add" else -1.0
        other, others = terms_of(e.args[1])
        for term, coefficient in others.items():
            terms[term] = _tidy(terms.get(term, 0.0) + sign * coefficient)
        return _tidy(number + sign * other), {t: c for t, c in terms.items() if c}
    coefficient, factors = factors_of(e)
    if not factors or coefficient == 0:
        return coefficient, {}
    term = product_of(1.0, factors)
    if term.op in ("add", "sub"):
        number, terms = terms_of(term)
        return _tidy(number * coefficient), {t: _tidy(c * coefficient) for t, c in terms.items()}
    return 0.0, {term: coefficient}


def _sum(number: float, terms: dict[Expression, float]) -> Expression:
    kept = {term: _tidy(c) for term, c in terms.items() if _tidy(c) != 0}
    number = _tidy(number)
    if not kept:
        return constant(number)
    order = sorted(kept, key=_sort_key)
    plus = [scaled(t, kept[t]) for t in order if kept[t] > 0]
    minus = [scaled(t, -kept[t]) for t in order if kept[t] < 0]
    if number > 0:
        plus.append(constant(number))
    elif number < 0:
        minus.append(constant(-number))
    if not plus:  # all terms are negative: the first carries its own sign
        first = next(t for t in order)
        plus, minus = [scaled(first, kept[first])], minus[1:]
    result = _chain("add", plus)
    for term in minus:
        result = Expression("sub", (result, term))
    return result


def scaled(e: Expression, coefficient: float) -> Expression:
    """Return an expression times a number."""
    own, factors = factors_of(e)
    return product_of(own * coefficient, factors)


# Functions of one operand -----------------------------------------------------------------------


def _magnitude(e: Expression) -> Expression:
    """Return the simplest expression with the absolute value of e."""
    coefficient, factors = factors_of(e)
    result = product_of(abs(coefficient), _magnitudes(factors))
    return result.args[0] if result.op == "abs" else result


def _reduction(e: Expression, arg: Expression) -> Expression:
    """Pull a constant factor out: sums, means and norms scale with it, a maximum if it is positive."""
    what = e.op.partition("_")[2]
    outside, factors = factors_of(arg)
    if outside == 0:
        return constant(0.0)
    if not factors:
        return e
    sign = 1.0
    if what == "norm":
        outside, factors = abs(outside), _magnitudes(factors)
    elif what == "max" and outside < 0:
        outside, sign = -outside, -1.0
    inside = product_of(sign, factors)
    if what == "norm" and inside.op == "abs":
        inside = inside.args[0]
    if inside.shape != arg.shape:
        return e
    return product_of(outside, {Expression(e.op, (inside,)): 1.0})


def _normalisation(e: Expression, arg: Expression) -> Expression:
    """Drop what normalising undoes: another normalisation, a shift, a positive factor."""
    while arg.op in _NORMALISATIONS:
        arg = arg.args[0]
    _, terms = terms_of(arg)
    if not terms:
        return constant(0.0)
    _, inner = unit_sum(0.0, terms, turn=False)
    if inner.shape == SCALAR:
        return constant(0.0)
    if inner.op in _NORMALISATIONS:
        return _normalisation(e, inner)
    return Expression(e.op, (inner,))
