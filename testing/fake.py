"""An evaluator that measures by a formula, and problems on its layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..metrics_dsl.parser import parse_metric
from ..search.core.candidate import Candidate, Layer, Measurement, Part, Reduction, Stage, Trial
from ..search.core.objectives import look_up_objectives
from ..search.core.protocols import Done, Searcher, Summaries, ignore
from ..search.spaces.allocation import Dense
from ..search.spaces.metric_space import MetricSpace
from ..search.spaces.optishear import MetaSpace
from ..search.spaces.problem import FixedRatios, Problem
from ..search.spaces.ratio_space import RATIO_SPACES


class FakeEvaluator:
    """Measures by a formula: the further a metric's size is from 7, the worse it is.

    So are ratios the further they are from growing with depth, and the sparser they are. Metrics with ``exp``
    fail. ``measured`` holds what was asked: key, stage, part and tokens.
    """

    layers: Sequence[Layer] = tuple(
        Layer(f"blocks.{b}.{kind}", b, kind, rows, 64)
        for b in range(4)
        for kind, rows in (("q", 48), ("v", 16), ("up", 96))
    )
    leaves = frozenset("WGXMVYD")

    def __init__(self) -> None:
        self.measured: list[tuple[str, Stage, Part, int]] = []

    def measure(
        self,
        candidates: Sequence[Candidate],
        stage: Stage,
        part: Part = "selection",
        tokens: int = 0,
        done: Done = ignore,
    ) -> list[Measurement]:
        """Return a measurement of each candidate, in order."""
        found = []
        for c in candidates:
            self.measured.append((c.key, stage, part, tokens))
            found.append(self._one(c, stage))
            done([(c, found[-1])])
        return found

    def summarise(self, metric: object, reductions: Sequence[Reduction]) -> Summaries:
        """Return random numbers, the same for metrics whose texts are as long."""
        rng = np.random.default_rng(len(str(metric)))
        shapes = {"quantiles": (len(self.layers), 65)}
        return {r: np.sort(rng.random(shapes.get(r, 4)), axis=-1) for r in reductions}

    def _one(self, c: Candidate, stage: Stage) -> Measurement:
        if "exp" in str(c.metric):
            return Measurement(stage, failure="exp is not measured here")
        sizes = np.array([layer.size for layer in self.layers])
        sparsity = float(np.array(c.ratios) @ sizes / sizes.sum())
        wanted = sparsity + 0.1 * (np.array([layer.block for layer in self.layers]) - 1.5)
        error = abs(c.metric.size - 7) + len(str(c.metric)) / 100
        error += 10 * float(np.square(np.array(c.ratios) - wanted).mean()) + sparsity
        values = {"layer_error": error, "sparsity": sparsity}
        tokens = 0
        if stage == "sensitivity":  # the derivative of kl below by each ratio
            slopes = 10 * (np.array(c.ratios) - wanted) / len(self.layers) + sizes / sizes.sum() / 2
            return Measurement(stage, seconds=0.01, tokens=400, sensitivities=tuple(slopes))
        if stage == "model":
            values |= {"kl": error / 2, "perplexity": 10 + error, "model_error": error}
            tokens = 100
        fingerprint = f"{str(c.metric)[:40]} {c.ratios}"
        errors = (error,) * len(self.layers)
        return Measurement(stage, errors, values, 0.01, fingerprint=fingerprint, tokens=tokens)

    def close(self) -> None:
        """Free nothing."""


LAYERS = FakeEvaluator.layers
DENSE = Dense(LAYERS, FakeEvaluator().summarise, parse_metric("abs(W) * X"))


@functools.cache
def _meta() -> MetaSpace:
    return MetaSpace()  # made of a table that takes a second to work out


def problem(
    objectives: str = "kl",
    leaves: str = "WGXMVYD",
    space: str = "tree",
    sparsity: float | tuple[float, float] = 0.5,
    **changes: Any,
) -> Problem:
    """Return a problem on the layers of ``FakeEvaluator``: its space, objectives and leaves by name."""
    names = space.split("+")
    metrics: Any = DENSE.metric
    if "tree" in names:
        metrics = MetricSpace(frozenset(leaves))
    elif "meta" in names:
        metrics = _meta()
    ratios = RATIO_SPACES[names[-1]](DENSE) if names[-1] in RATIO_SPACES else FixedRatios(LAYERS)
    return Problem(metrics, ratios, look_up_objectives(objectives.split(",")), sparsity, **changes)


def told(searcher: Searcher, rounds: int = 5, count: int = 8) -> list[str]:
    """Ask and tell through ``FakeEvaluator``; return the keys of all that was asked."""
    fake, asked = FakeEvaluator(), []
    for _ in range(rounds):
        batch = searcher.ask(count)
        found = fake.measure(batch, "model")
        slopes = fake.measure(batch[:1], "sensitivity", "statistics")[0].sensitivities
        found[0] = replace(found[0], sensitivities=slopes)
        searcher.tell(
            [Trial(c, m, "failed" if m.failure else "measured") for c, m in zip(batch, found, strict=True)]
        )
        asked += [c.key for c in batch]
    return asked
