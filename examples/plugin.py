"""Somebody else's objective, operator, leaf, searcher and exporter: rows for five tables of secateur."""

import math
import random

from secateur import COLUMN, Encoding, Exporter, Expression, Leaf, Objective, Operator, SearcherRow


def worst_layer(trial):
    """Return the largest error of a layer; trials that measured no layers have none."""
    return max(trial.measurement.layer_errors, default=None)


class Climber:
    """Asks for the best metric so far times a new one, or for a new one alone."""

    def __init__(self, problem, seed):
        self.problem, self.rng = problem, random.Random(seed)
        self.waiting, self.best = list(problem.starts), None

    def ask(self, count):
        """Return what is to be measured."""
        asked, self.waiting = self.waiting[:count], self.waiting[count:]
        asked += [self.proposal() for _ in range(count - len(asked))]
        return [self.problem.candidate(encoding) for encoding in asked]

    def tell(self, trials):
        """Keep the metric with the least divergence."""
        known = [(t.measurement.values["kl"], str(t.candidate.metric), t.candidate.metric)
                 for t in trials if "kl" in t.measurement.values]  # fmt: skip
        self.best = min([*known, *([self.best] if self.best else [])], default=None)

    def proposal(self):
        """Return one encoding: a tree where trees are searched, and a value of each variable."""
        values = tuple(variable.draw(self.rng) for variable in self.problem.variables)
        trees = self.problem.trees
        if trees is None:
            return Encoding(None, values)
        tree = trees.draw(self.rng)
        if self.best and self.rng.random() < 0.5:
            tree = trees.simplest(Expression("mul", (self.best[2], tree))) or tree
        return Encoding(tree, values)


def write_ratios(record, path):
    """Write a ratio a line."""
    pairs = zip(record.layers, record.candidate.ratios, strict=True)
    path.write_text("".join(f"{layer.name}\t{ratio}\n" for layer, ratio in pairs), encoding="utf-8")


SECATEUR = [
    Objective("worst_layer", "screen", worst_layer, "largest relative error of a layer's output", "relative"),
    Operator(
        "cbrt", 1, "elementwise", "the cube root, with the sign of x",
        compute=lambda x: x.sign() * x.abs().pow(1 / 3),
        order="increasing",
        nonnegative=lambda signs, _exponent: signs[0],
        number=lambda x: math.copysign(abs(x) ** (1 / 3), x),
        python="{0}.sign() * {0}.abs().pow(1 / 3)",
        latex=r"\sqrt[3]{{{0}}}",
    ),
    Leaf(
        "K", COLUMN, True, "mean absolute product of an input feature with all of them", "activation^2",
        needs=("H",), compute=lambda given: given["H"].abs().mean(0, keepdim=True),
    ),
    SearcherRow("climber", lambda problem, seed, _batch: Climber(problem, seed), "a climb by products"),
    Exporter("ratios-tsv", ".tsv", "candidate", "the ratio of each layer as a table with tabs", write_ratios),
]  # fmt: skip
