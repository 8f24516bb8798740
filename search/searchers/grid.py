"""Grid search over one number: evenly spaced at any budget."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.candidate import Candidate, Trial
from ..spaces.problem import Problem
from ..spaces.variables import Encoding
from .abilities import GRID


class GridSearcher:
    """Asks both ends of a range, then the middle, then the middles of the halves, and so on.

    Args:
        problem: Has one number and nothing else to search.

    Raises:
        SecateurError: When it has not.
    """

    def __init__(self, problem: Problem) -> None:
        GRID.check("grid", problem)
        self._problem = problem
        self._asked = 0

    def ask(self, count: int) -> list[Candidate]:
        """Return the next ``count`` points."""
        (variable,) = self._problem.variables
        shares = [_share(i) for i in range(self._asked, self._asked + count)]
        self._asked += count
        values = [variable.low + share * (variable.high - variable.low) for share in shares]
        return [self._problem.candidate(Encoding(None, (value,))) for value in values]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn nothing."""


def _share(index: int) -> float:
    """Return 0, 1, then the binary fractions in the order of their size: van der Corput's sequence."""
    if index < 2:
        return float(index)
    index, share, step = index - 1, 0.0, 0.5
    while index:
        share += step * (index & 1)
        index, step = index >> 1, step / 2
    return share
