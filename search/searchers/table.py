"""The table of searchers."""

from __future__ import annotations

from collections.abc import Callable

from ..core.objectives import look_up
from ..core.protocols import Searcher
from ..spaces.problem import Problem


def _gp(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .gp import GeneticProgramming  # imports DEAP

    return GeneticProgramming(problem, seed=seed)


def _nsga3(problem: Problem, seed: int, batch: int) -> Searcher:
    from .nsga3 import NSGA3Searcher  # imports pymoo

    return NSGA3Searcher(problem, seed=seed, batch=batch)


def _tpe(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .tpe import TPESearcher  # imports Optuna

    return TPESearcher(problem, seed=seed)


def _descent(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .descent import Descent

    return Descent(problem, seed=seed)


def _evolution(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .evolution import Evolution

    return Evolution(problem, seed=seed)


def _cma(problem: Problem, seed: int, batch: int) -> Searcher:
    from .cma import CovarianceAdaptation  # imports pycma

    return CovarianceAdaptation(problem, seed=seed, batch=batch)


def _random(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .random_search import RandomSearcher

    return RandomSearcher(problem, seed=seed)


def _grid(problem: Problem, _seed: int, _batch: int) -> Searcher:
    from .grid import GridSearcher

    return GridSearcher(problem)


SEARCHERS: dict[str, Callable[[Problem, int, int], Searcher]] = {
    "gp": _gp,
    "nsga3": _nsga3,
    "tpe": _tpe,
    "evolution": _evolution,
    "descent": _descent,
    "cma": _cma,
    "random": _random,
    "grid": _grid,
}


def build_searcher(name: str, problem: Problem, seed: int, batch: int = 16) -> Searcher:
    """Return a new searcher by name.

    Raises:
        SecateurError: For an unknown name, or a problem that the searcher cannot represent.
    """
    return look_up(SEARCHERS, name, "a searcher")(problem, seed, batch)
