"""Random search: the yardstick that every other searcher has to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..core.candidate import Candidate, Trial
from ..spaces.problem import Problem
from ..spaces.variables import Encoding, draw


class RandomSearcher:
    """Draws metrics and ratios independently of what was measured, after what the user starts from.

    Args:
        problem: What to draw from.
        seed: Seed of the searcher's own generator.
    """

    def __init__(self, problem: Problem, *, seed: int) -> None:
        self._problem = problem
        self._rng = random.Random(seed)
        self._waiting = list(problem.starts)

    def ask(self, count: int) -> list[Candidate]:
        """Return ``count`` candidates."""
        trees = self._problem.trees
        encodings, self._waiting = self._waiting[:count], self._waiting[count:]
        encodings += [
            Encoding(trees.draw(self._rng) if trees else None, draw(self._problem.variables, self._rng))
            for _ in range(count - len(encodings))
        ]
        return [self._problem.candidate(encoding) for encoding in encodings]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn nothing."""
