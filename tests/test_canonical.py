"""Canonical forms and order forms over ten thousand random expressions."""

import random

import pytest
import torch
from secateur.metrics_dsl.canonical import canonical
from secateur.metrics_dsl.expression import Expression, constant
from secateur.metrics_dsl.operators import FULL, LEAVES, ROW, SCALAR
from secateur.metrics_dsl.order import order_form
from secateur.metrics_dsl.parser import parse
from secateur.metrics_dsl.published import PUBLISHED
from secateur.metrics_dsl.score import score
from secateur.search.spaces.metric_space import MetricSpace
from secateur.workers.measure.masks import removed

COUNT = 10_000
ROWS, COLUMNS = 6, 24


@pytest.fixture(scope="module")
def expressions() -> list[Expression]:
    """Random trees of all shapes and operators, not simplified, the same in every run."""
    rng = random.Random(20)
    space = MetricSpace(frozenset(LEAVES))
    return [space.tree(rng, FULL, rng.randint(1, 6)) for _ in range(COUNT)]


def layer(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, torch.Tensor]:
    """Leaves of a random layer, in double precision so that rounding does not look like algebra."""
    draw = torch.Generator().manual_seed(seed)
    size = {FULL: (rows, columns), ROW: (rows, 1)}
    leaves = {}
    for name, leaf in LEAVES.items():
        value = torch.randn(size.get(leaf.shape, (1, columns)), generator=draw, dtype=torch.float64)
        leaves[name] = value.abs() + 0.01 if leaf.nonnegative else value
    return leaves


def full_score(expression: Expression, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    return score(expression, leaves).expand(leaves["W"].shape)


def test_text_of_every_expression_reads_back_to_the_same_tree(expressions):
    for expression in expressions:
        assert parse(str(expression)) == expression


def test_canonical_form_is_idempotent(expressions):
    for expression in expressions:
        form = canonical(expression)
        assert canonical(form) == form, str(expression)


def test_order_form_is_idempotent(expressions):
    for expression in expressions:
        for group in ("row", "layer"):
            form = order_form(expression, group)
            assert order_form(form, group) == form, str(expression)


def test_canonical_form_has_the_same_value(expressions):
    checked = 0
    for number, expression in enumerate(expressions):
        leaves = layer(number)
        before = full_score(expression, leaves)
        if not before.isfinite().all() or before.abs().max() > 1e12:
            continue
        after = full_score(canonical(expression), leaves)
        # Differences of large terms lose digits in either form; the size of the values is the scale.
        scale = max(1.0, float(before.abs().max()))
        assert torch.allclose(before, after, rtol=1e-6, atol=1e-6 * scale), str(expression)
        checked += 1
    assert checked > 0.8 * COUNT


@pytest.mark.parametrize("group", ["row", "layer"])
def test_order_form_gives_the_same_masks(expressions, group):
    """Where scores are apart by more than rounding the weights removed are the very same ones."""
    checked = 0
    for number, expression in enumerate(expressions):
        leaves = layer(number)
        before = full_score(expression, leaves)
        after = full_score(order_form(expression, group), leaves)
        if not (before.isfinite().all() and after.isfinite().all()):
            continue
        ratio = 0.5
        mask, form = removed(before, ratio, group), removed(after, ratio, group)
        differ = mask != form
        if differ.any():
            # Only ties may go either way: weights whose score equals another's up to rounding.
            # A normalised constant is rounding noise before, a plain tie after.
            assert any(only_ties(s, differ, group) for s in (before, after)), str(expression)
        else:
            checked += 1
    assert checked > 0.75 * COUNT


def only_ties(scores: torch.Tensor, differ: torch.Tensor, group: str) -> bool:
    rows = scores if group == "row" else scores.reshape(1, -1)
    where = differ if group == "row" else differ.reshape(1, -1)
    for row, changed in zip(rows, where, strict=True):
        if changed.any():
            values = row[changed]
            spread = values.max() - values.min()
            scale = max(float(row.abs().max()), 1e-300)
            if spread > 1e-9 * scale:
                return False
    return True


def equivalent(rng: random.Random, metric: Expression, group: str) -> Expression:
    """Wrap a metric in something that changes no order: the reverse of what the order form does."""
    kind = rng.randrange(7)
    if kind == 0:
        return Expression("mul", (constant(rng.choice([0.5, 2.0, 100.0])), metric))
    if kind == 1:
        return Expression("add", (metric, constant(rng.uniform(-2, 2))))
    if kind == 2:
        return Expression(rng.choice(["minmax", "zscore", "tanh", "sigmoid"]), (metric,))
    if kind == 3 and metric.nonnegative:
        return Expression(rng.choice(["sqrt", "square", "log", "log1p", "abs"]), (metric,))
    if kind == 4:
        factor = Expression("Y") if group == "row" else Expression("all_norm", (Expression("W"),))
        return Expression(rng.choice(["mul", "div"]), (metric, factor))
    if kind == 5 and metric.op in ("add", "mul"):
        return Expression(metric.op, metric.args[::-1])
    return Expression("neg", (Expression("neg", (metric,)),))


@pytest.mark.parametrize("group", ["row", "layer"])
def test_equivalent_metrics_have_one_order_form_and_identical_masks(expressions, group):
    rng = random.Random(7)
    same = 0
    for number, metric in enumerate(expressions):
        other = metric
        for _ in range(rng.randint(1, 3)):
            other = equivalent(rng, other, group)
        one, two = order_form(metric, group), order_form(other, group)
        if one != two:
            continue
        same += 1
        leaves = {name: leaf.float() for name, leaf in layer(number).items()}
        scores = full_score(one, leaves)
        if scores.isfinite().all():
            assert torch.equal(removed(scores, 0.6, group), removed(full_score(two, leaves), 0.6, group))
    assert same > 0.97 * COUNT


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("X * abs(W)", "abs(W) * X"),
        ("abs(W * X)", "abs(W) * X"),
        ("sqrt(square(W) * square(X))", "abs(W) * X"),
        ("W - W + abs(W)", "abs(W)"),
        ("--W", "W"),
        ("square(sqrt(W))", "abs(W)"),
        ("W * W * W", "W**3"),
        ("0.1 * W + 0.2 * W", "0.3 * W"),
        ("abs(X - W)", "abs(W - X)"),
        ("minmax(2 * G + 1)", "minmax(G)"),
        ("abs(W) / (X / Y)", "abs(W) * Y / X"),
        ("col_sum(W * 0 + X) * W", "W * col_sum(W * 0 + X)"),
    ],
)
def test_known_canonical_forms(text, form):
    assert str(canonical(parse(text))) == form


@pytest.mark.parametrize(
    ("text", "group", "form"),
    [
        ("tanh(3 * abs(W) * X + Y)", "row", "abs(W) * X"),
        ("tanh(3 * abs(W) * X + Y)", "layer", "3 * abs(W) * X + Y"),
        ("square(W) * square(X) * Y", "row", "abs(W) * X"),
        ("square(W) * square(X) / all_sum(abs(W))", "layer", "abs(W) * X"),
        ("1 - W", "row", "-W"),
        ("zscore(abs(W))", "layer", "abs(W)"),
        ("row_norm(W) * abs(W)", "row", "abs(W)"),
    ],
)
def test_known_order_forms(text, group, form):
    assert order_form(parse(text), group) == order_form(parse(form), group)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_metrics_are_scored_as_written(name):
    """Their order form differs in nothing but the order of two operands, which rounds alike."""
    metric = PUBLISHED[name].expression
    leaves = {n: leaf.float() for n, leaf in layer(3, 64, 96).items()}
    for group in ("row", "layer"):
        assert torch.equal(score(metric, leaves), score(order_form(metric, group), leaves))


@pytest.mark.parametrize("text", ["W**16 * W**16 * X", "abs(W) * (1e200 * 1e200)", "1e308 * W + 1e308 * W"])
def test_numbers_that_would_leave_their_range_are_left_as_they_are(text):
    assert order_form(parse(text), "row") == parse(text)


def test_deep_nesting_takes_no_time():
    text = "W - X"
    for _ in range(30):
        text = f"abs({text}) - X"
    assert order_form(parse(text), "row") == parse(text)


def test_dividing_by_zero_gives_zero():
    leaves = {"W": torch.tensor([[1.0, -2.0]]), "X": torch.tensor([[0.0, 4.0]])}
    assert score(parse("W / X"), leaves).tolist() == [[0.0, -0.5]]
    assert score(parse("W * X**-1"), leaves).tolist() == [[0.0, -0.5]]
    assert constant(1).shape == SCALAR
