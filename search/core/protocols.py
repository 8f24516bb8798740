"""The two protocols that the loop knows: searchers propose, evaluators measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...metrics_dsl.expression import Expression
from .candidate import Candidate, Layer, Measurement, Part, Reduction, Stage, Trial

Summaries = dict[Reduction, NDArray[np.float64]]
# Called with what has just been measured.
Done = Callable[[Sequence[tuple[Candidate, Measurement]]], None]


def ignore(_measured: Sequence[tuple[Candidate, Measurement]]) -> None:
    """Do nothing with what has just been measured."""


class Searcher(Protocol):
    """Proposes candidates and learns from trials.

    A searcher owns its random generators: the same constructor arguments and the same told trials lead
    to the same proposals, in every process. That is what makes resuming a replay.
    """

    def ask(self, count: int) -> list[Candidate]:
        """Return about ``count`` candidates, repeats allowed; none when there is nothing left."""

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn from the trials of what was asked, in that order, failures and rejects included."""


class Evaluator(Protocol):
    """Measures candidates on one model and calibration."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers in model order."""

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that metrics may use; calibration without gradients has no ``G``."""

    def measure(
        self,
        candidates: Sequence[Candidate],
        stage: Stage,
        part: Part = "selection",
        tokens: int = 0,
        done: Done = ignore,
    ) -> list[Measurement]:
        """Return a measurement of each candidate, in order; a candidate's mistake is a failure in it.

        What is measured of one candidate does not depend on its companions in the call. ``part`` says
        which tokens the model stage and sensitivities run on, and ``tokens`` how many of them, 0 being all.
        ``done`` is called with each as soon as it is known, in whatever order.
        """

    def summarise(self, metric: Expression, reductions: Sequence[Reduction]) -> Summaries:
        """Return reductions of a metric's scores on the dense model.

        Each has one number a block, (blocks,), but ``quantiles`` has evenly spaced ones of each layer in
        ascending order, (layers, points).
        """

    def close(self) -> None:
        """Free what the evaluator holds."""
