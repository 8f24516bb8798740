"""The two protocols that the loop knows: searchers propose, evaluators measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .candidate import Candidate, Layer, Measurement, Part, Stage, Trial


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
        self, candidates: Sequence[Candidate], stage: Stage, part: Part = "selection"
    ) -> list[Measurement]:
        """Return a measurement of each candidate, in order; a candidate's mistake is a failure in it.

        What is measured of one candidate does not depend on its companions in the call. ``part`` says
        which tokens the model stage runs on.
        """

    def close(self) -> None:
        """Free what the evaluator holds."""
