"""The table of searchers and what they are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..metrics_dsl.expression import Expression
from .candidate import Candidate, Trial
from .objectives import Objective, look_up
from .protocols import Searcher
from .space import MetricSpace


@dataclass(frozen=True)
class Problem:
    """What is searched: the metrics allowed, how one becomes a candidate, and what to minimise."""

    space: MetricSpace
    complete: Callable[[Expression], Candidate]
    objectives: Sequence[Objective]


def _random(problem: Problem, seed: int) -> Searcher:
    from .random_search import RandomSearcher

    return RandomSearcher(problem.space, problem.complete, seed=seed)


def _gp(problem: Problem, seed: int) -> Searcher:
    from .gp import GeneticProgramming  # imports DEAP

    return GeneticProgramming(problem.space, problem.complete, problem.objectives, seed=seed)


SEARCHERS: dict[str, Callable[[Problem, int], Searcher]] = {"gp": _gp, "random": _random}


def build_searcher(name: str, problem: Problem, seed: int) -> Searcher:
    """Return a new searcher by name.

    Raises:
        ValueError: For an unknown name.
    """
    return look_up(SEARCHERS, name, "a searcher")(problem, seed)


class Opening:
    """A searcher that asks for given candidates first: the baselines of a run.

    Args:
        searcher: Takes over once the opening has been asked.
        candidates: What to ask first.
        tell: Whether the searcher learns of the opening's trials (seeding).
    """

    def __init__(self, searcher: Searcher, candidates: Sequence[Candidate], *, tell: bool) -> None:
        self._searcher = searcher
        self._waiting = list(candidates)
        self._opening = {candidate.key for candidate in candidates}
        self._tell = tell

    def ask(self, count: int) -> list[Candidate]:
        """Return the whole opening at first, then what the searcher proposes."""
        asked, self._waiting = self._waiting, []
        return asked or self._searcher.ask(count)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Pass the trials on, the opening's only if it seeds the searcher."""
        self._searcher.tell([t for t in trials if self._tell or t.candidate.key not in self._opening])
