"""OptiShear's family of metrics: two coefficients and two functions, seven choices each.

A score is c_W(|W|) u_W(|W|) times c_X(a) u_X(sqrt(a)), where a = 2048 X**2 is the mean over sequences of
2048 tokens of each input feature's sum of squares (arXiv 2502.10735, code at 1b6f4ef). Most of the 7**4
names are the same metric: they are told apart by the order in which they put the weights of a probe, so a
search spends nothing on duplicates. Our log and division are protected, so none of them fails.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

from ...metrics_dsl.expression import Expression
from ...metrics_dsl.operators import LEAVES
from ...metrics_dsl.order import order_form
from ...metrics_dsl.parser import parse_metric
from .variables import Values, Variable

if TYPE_CHECKING:
    from torch import Tensor

_FUNCTIONS = {
    "identity": "{x}", "sqrt": "sqrt({x})", "square": "square({x})", "exp": "exp({x})", "log": "log({x})",
    "sigmoid": "sigmoid({x})", "softmax": "exp({x}) / {over}_sum(exp({x}))",
}  # fmt: skip
_OF_WEIGHTS = {
    "none": "1", "row": "1 / row_sum({x})", "column": "1 / col_sum({x})",
    "relative": "(1 / row_sum({x}) + 1 / col_sum({x}))", "total": "1 / all_sum({x})",
    "mean": "1 / all_mean({x})", "norm": "1 / all_norm({x})",
}  # fmt: skip
# a has one row: summed over it, it is a number, and over each column, itself.
_OF_INPUTS = {
    "none": "1", "row": "1 / all_sum({x})", "column": "1 / {x}",
    "relative": "(1 / all_sum({x}) + 1 / {x})", "total": "1 / all_sum({x})",
    "mean": "1 / all_mean({x})", "norm": "1 / all_norm({x})",
}  # fmt: skip
_PROBED = "WGXMVDY"  # leaves that the probe has; those that others add would change its numbers
_A = "(2048 * square(X))"
_ROOT = "(45.25483399593904 * X)"


class MetaSpace:
    """The 2401 metrics of the family, each name standing for the simplest metric of its order.

    Attributes:
        variables: The four choices.
        names: How many combinations there are.
        distinct: How many different metrics they are.
    """

    def __init__(self, group: str = "row") -> None:
        tables = (_OF_WEIGHTS, _FUNCTIONS, _OF_INPUTS, _FUNCTIONS)
        names = ("coefficient of W", "function of W", "coefficient of X", "function of X")
        self.variables: Sequence[Variable] = tuple(
            Variable(name, choices=tuple(table)) for name, table in zip(names, tables, strict=True)
        )
        forms = {choice: order_form(parse_metric(_text(choice)), group) for choice in product(*tables)}
        simplest_first = sorted(set(forms.values()), key=lambda form: (form.size, str(form)))
        self._group = group
        self._first: dict[bytes, Expression] = {}
        same = {form: self._first.setdefault(_order(form, group), form) for form in simplest_first}
        self._metrics = {choice: same[form] for choice, form in forms.items()}
        self.names = len(forms)
        self.distinct = len(self._first)

    def metric(self, values: Values) -> Expression:
        """Return the metric that four choices stand for."""
        pairs = zip(self.variables, values, strict=True)
        return self._metrics[tuple(variable.choices[int(value)] for variable, value in pairs)]  # type: ignore[index]

    def values(self, metric: Expression) -> Values | None:
        """Return choices that stand for a metric, None if none orders the weights as it does."""
        if not metric.leaves <= set(_PROBED):
            return None
        wanted = self._first.get(_order(order_form(metric, self._group), self._group))
        for choice, other in self._metrics.items():
            if other == wanted:
                pairs = zip(self.variables, choice, strict=True)
                return tuple(float(variable.choices.index(name)) for variable, name in pairs)
        return None


def _text(choice: tuple[str, ...]) -> str:
    of_weights, function, of_inputs, root_function = choice
    factors = (
        _OF_WEIGHTS[of_weights].format(x="abs(W)"),
        _FUNCTIONS[function].format(x="abs(W)", over="row"),
        _OF_INPUTS[of_inputs].format(x=_A),
        _FUNCTIONS[root_function].format(x=_ROOT, over="all"),
    )
    return " * ".join(f"({factor})" for factor in factors)


def _order(form: Expression, group: str) -> bytes:
    """Return the order of a random probe's weights under a form."""
    from ...metrics_dsl.score import score

    probe = _probe()
    scores = score(form, probe).expand(probe["W"].shape)
    flat = scores if group == "row" else scores.reshape(1, -1)
    return flat.argsort(dim=1, stable=True).short().numpy().tobytes()


@lru_cache(maxsize=1)
def _probe() -> dict[str, Tensor]:
    """Return the leaves of the probe.

    Its inputs are small, so that nothing is rounded together where exp or sigmoid grow flat.
    """
    import torch

    draw = random.Random(0)
    rows, columns = 24, 64
    probe = {}
    for name in _PROBED:
        leaf = LEAVES[name]
        shape = rows if leaf.shape.rows else 1, columns if leaf.shape.columns else 1
        numbers = [draw.lognormvariate(-4, 0.7) for _ in range(shape[0] * shape[1])]
        probe[name] = torch.tensor(numbers, dtype=torch.float64).reshape(shape)
    signs = torch.tensor([draw.choice((-1.0, 1.0)) for _ in range(rows * columns)], dtype=torch.float64)
    probe["W"] = probe["W"] * signs.reshape(rows, columns)
    return probe
