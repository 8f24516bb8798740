"""Random search: the yardstick that every other searcher has to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..core.candidate import Candidate, Trial
from ..spaces.problem import Problem
from ..spaces.variables import Encoding, draw


class RandomSearcher:
    """Draws metrics and ratios independently of what was measured.

    Args:
        problem: What to draw from.
        seed: Seed of the searcher's own generator.
    """

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self._problem = problem
        self._rng = random.Random(seed)

    def ask(self, count: int) -> list[Candidate]:
        """Return ``count`` random candidates."""
        trees = self._problem.trees
        encodings = [
            Encoding(trees.draw(self._rng) if trees else None, draw(self._problem.variables, self._rng))
            for _ in range(count)
        ]
        return [self._problem.candidate(encoding) for encoding in encodings]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn nothing."""
