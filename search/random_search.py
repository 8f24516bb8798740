"""Random search: the yardstick that every other searcher has to beat."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..metrics_dsl.expression import Expression
from .candidate import Candidate, Trial
from .space import MetricSpace


class RandomSearcher:
    """Draws metrics independently of what was measured.

    Args:
        space: The metrics to draw from.
        complete: Turns a metric into a candidate.
        seed: Seed of the searcher's own generator.
    """

    def __init__(self, space: MetricSpace, complete: Callable[[Expression], Candidate], *, seed: int) -> None:
        self._space = space
        self._complete = complete
        self._rng = random.Random(seed)

    def ask(self, count: int) -> list[Candidate]:
        """Return ``count`` random candidates."""
        return [self._complete(self._space.draw(self._rng)) for _ in range(count)]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn nothing."""
