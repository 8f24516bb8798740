"""The language: what texts mean, and what mistakes are told."""

import contextlib
import inspect
import math
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from secateur.metrics_dsl.expression import Expression, MetricError, constant
from secateur.metrics_dsl.operators import LEAVES, OPERATORS, SCALAR, Shape
from secateur.metrics_dsl.parser import MAX_LENGTH, parse, parse_metric
from secateur.metrics_dsl.score import Scorer, score

W = torch.tensor([[0.5, -2.0, 0.0], [3.0, 1.0, -1.0]], dtype=torch.float64)
X = torch.tensor([[2.0, 0.0, 4.0]], dtype=torch.float64)
Y = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
LEAVES_OF_A_LAYER = {"W": W, "X": X, "Y": Y, "G": W.abs(), "M": X - 2, "V": X, "D": X + 1}


def by_hand(function):
    """Apply a function of plain numbers to W, weight by weight."""
    return torch.tensor([[function(v) for v in row] for row in W.tolist()], dtype=torch.float64)


MEANING = {
    "W + X": W + X,
    "W - Y": W - Y,
    "W * X": W * X,
    "W / X": torch.tensor([[0.25, 0.0, 0.0], [1.5, 0.0, -0.25]], dtype=torch.float64),
    "-W": -W,
    "abs(W)": by_hand(abs),
    "square(W)": by_hand(lambda v: v * v),
    "sqrt(W)": by_hand(lambda v: math.sqrt(abs(v))),
    "log(W)": by_hand(lambda v: math.log(abs(v) + 1e-3)),
    "log1p(W)": by_hand(lambda v: math.log1p(abs(v))),
    "exp(100 * W)": by_hand(lambda v: math.exp(min(100 * v, 80))),
    "tanh(W)": by_hand(math.tanh),
    "sigmoid(W)": by_hand(lambda v: 1 / (1 + math.exp(-v))),
    "W**3": by_hand(lambda v: v**3),
    "W**1.5": by_hand(lambda v: abs(v) ** 1.5),
    "W**-1": by_hand(lambda v: 1 / v if v else 0.0),
    "W**-0.5": by_hand(lambda v: abs(v) ** -0.5 if v else 0.0),
    "minmax(W)": (W + 2) / 5,
    "zscore(W)": (W - W.mean()) / W.std(correction=0),
    "minmax(X)": X / 4,
    "row_sum(W)": torch.tensor([[-1.5], [3.0]]),
    "row_mean(W)": torch.tensor([[-0.5], [1.0]]),
    "row_norm(W)": torch.tensor([[math.sqrt(4.25)], [math.sqrt(11)]]),
    "row_max(W)": torch.tensor([[0.5], [3.0]]),
    "col_sum(W)": torch.tensor([[3.5, -1.0, -1.0]]),
    "col_mean(W)": torch.tensor([[1.75, -0.5, -0.5]]),
    "col_norm(W)": torch.tensor([[math.sqrt(9.25), math.sqrt(5), 1.0]]),
    "col_max(W)": torch.tensor([[3.0, 1.0, 0.0]]),
    "all_sum(W)": torch.tensor([[1.5]]),
    "all_mean(W)": torch.tensor([[0.25]]),
    "all_norm(W)": torch.tensor([[math.sqrt(15.25)]]),
    "all_max(W)": torch.tensor([[3.0]]),
    "minmax(W * 0)": W * 0,
    "zscore(0 * W)": W * 0,
}


@pytest.mark.parametrize("text", MEANING)
def test_every_operator_means_what_its_table_says(text):
    assert torch.allclose(score(parse(text), LEAVES_OF_A_LAYER), MEANING[text].double(), atol=1e-12)


def test_every_operator_has_a_tested_meaning():
    used = {node for text in MEANING for node in _names(parse(text))}
    assert used >= set(OPERATORS)


def _names(e):
    return {e.op}.union(*(_names(arg) for arg in e.args))


@pytest.mark.parametrize("name", OPERATORS)
def test_facts_of_an_operator_hold(name):
    """Shape, sign and order as in the table, on random operands."""
    operator = OPERATORS[name]
    assert operator.meaning
    operands = [Expression("W"), Expression("G")][: operator.arity]
    e = Expression(name, tuple(operands), 1.5 if name == "pow" else None)
    value = score(e, LEAVES_OF_A_LAYER)
    assert (value.shape[0] > 1, value.shape[1] > 1) == e.shape
    if e.nonnegative:
        assert (value >= 0).all()
    if operator.order in ("increasing", "magnitude", "decreasing"):
        before = W.abs() if operator.order == "magnitude" else W
        sign = -1 if operator.order == "decreasing" else 1
        order = (sign * before).flatten().argsort(stable=True)
        assert (value.flatten()[order].diff() >= -1e-12).all()


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_any_expression_prints_back(seed, depth):
    from secateur.search.spaces.metric_space import MetricSpace

    rng = random.Random(seed)
    e = MetricSpace(frozenset(LEAVES)).tree(rng, rng.choice([Shape(True, True), SCALAR]), depth)
    assert parse(str(e)) == e


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("X^1.2*abs(W)", "X**1.2 * abs(W)"),
        (" abs( W )\n * X ", "abs(W) * X"),
        ("mul(W, pow(X, -2))", "W * X**-2"),
        ("-2 * W", "-2 * W"),
        ("neg(2) * W", "neg(2) * W"),
        ("-(-W)", "-(-W)"),
        ("(-2)**2 * W", "(-2)**2 * W"),
        ("W - (X - Y)", "W - (X - Y)"),
        ("W / (X / Y)", "W / (X / Y)"),
        ("1e-3 * W + -0.0", "0.001 * W + 0"),
    ],
)
def test_texts_have_one_printed_form(text, printed):
    assert str(parse(text)) == printed
    assert parse(printed) == parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "got an empty text"),
        ("sqrtt(W)", "column 1: unknown operator 'sqrtt'; did you mean 'sqrt'"),
        ("abs(w) * X", "column 5: unknown leaf 'w'; did you mean 'W'"),
        ("W^2 + sqr(X)", "column 7: unknown operator 'sqr'"),
        ("abs(W", "column 4: this '(' is never closed"),
        ("abs(W))", "column 7: this ')' closes nothing"),
        ("abs(W) *", "column 8"),
        ("W $ X", "column 3: the character '$'"),
        ("(" * 10_000 + "W" + ")" * 10_000, f"at most {MAX_LENGTH} characters"),
        ("(" * 200 + "W" + ")" * 200, "at most 64 levels of parentheses"),
        ("-" * 1900 + "W", "at most 64 levels of nesting"),
        ("+".join("W" * 900), "at most 64 levels of nesting"),
        ("1e999 * W", "expected a finite number"),
        ("9" * 400 + " * W", "expected a finite number"),
        ("W**1e400", "expected a finite number"),
        ("W * 1j", "expected a real number"),
        ("W**X", "column 4: expected a number as exponent"),
        ("W**0", "expected an exponent between -16 and 16"),
        ("9**9**9", "expected a number as exponent"),
        ("abs(W, X)", "abs takes 1 operand(s), got 2"),
        ("W(X)", "W is a leaf, not an operator"),
        ("abs * W", "abs is an operator; write abs(...)"),
        ("True * W", "expected a real number"),
        ("W if X else G", "expected numbers, leaves"),
        ("__import__", "unknown leaf"),
        ("open(W)", "unknown operator 'open'"),
        ("W.shape", "expected numbers, leaves"),
        ("X", "expected a score of shape (rows, columns), got (1, columns)"),
        ("row_sum(abs(W))", "whatever its column"),
        ("3", "every weight of the layer gets the same score"),
        ("W - W + X", "simplifies to `X`"),
        ("col_sum(X) * W", "col_sum: expected an operand with rows"),
        ("minmax(3) * W", "more than one value"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_a_way_out(text, says):
    with pytest.raises(MetricError) as caught:
        parse_metric(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="WXGabs()*+-/^., 01e", max_size=40))
def test_no_text_raises_anything_else(text):
    with contextlib.suppress(MetricError):
        assert parse(str(parse(text))) == parse(text)


def test_nothing_is_evaluated_as_python():
    import secateur.metrics_dsl.parser as module

    source = inspect.getsource(module)
    assert not re.search(r"(?<![.\w])(eval|exec|compile)\(", source)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_constants_are_finite(value):
    with pytest.raises(MetricError, match="finite"):
        constant(value)


def test_scoring_some_rows_gives_those_rows_of_all():
    """Also through reductions over rows, which see all of them."""
    rows = torch.tensor([1])
    sampled = {n: t if t.shape[0] == 1 else t[rows] for n, t in LEAVES_OF_A_LAYER.items()}
    for text in ("W / col_sum(abs(W)) + row_sum(W)", "minmax(W) * zscore(G)", "W * all_norm(W) * X"):
        whole = score(parse(text), LEAVES_OF_A_LAYER)
        some = Scorer(LEAVES_OF_A_LAYER, sampled).score(parse(text))
        assert torch.equal(some, whole[rows])


def test_a_common_subexpression_is_computed_once(monkeypatch):
    calls = []
    operator = OPERATORS["abs"]
    counted = lambda x: (calls.append(1), x.abs())[1]  # noqa: E731
    monkeypatch.setitem(OPERATORS, "abs", type(operator)(**{**vars(operator), "compute": counted}))
    scorer = Scorer(LEAVES_OF_A_LAYER)
    scorer.score(parse("abs(W) * X + abs(W) / row_sum(abs(W))"))
    scorer.score(parse("abs(W) * Y"))
    assert len(calls) == 1


def test_a_missing_leaf_is_named():
    with pytest.raises(MetricError, match="needs G"):
        score(parse("W * G"), {"W": W})
