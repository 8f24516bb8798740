"""The table of searchers: what each is called, how it is made and what it can search.

Reading it imports no library that searches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.plugins import guarded, open_table
from ..core import defaults
from .abilities import ANYTHING, CMA, DESCENT, EVOLUTION, GP, GRID, NSGA3, TPE, Abilities

if TYPE_CHECKING:
    from ..core.candidate import Candidate, Trial
    from ..core.protocols import Searcher
    from ..spaces.problem import Problem


@dataclass(frozen=True)
class SearcherRow:
    """A searcher as the table has it.

    Attributes:
        name: The name in settings.
        build: Returns a new one for (problem, seed, batch); libraries that take long are imported here.
        meaning: What it does, in a few words that help texts and documents show.
        can: What it can search.
    """

    name: str
    build: Callable[[Problem, int, int], Searcher]
    meaning: str
    can: Abilities = ANYTHING


def _descent(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .descent import Descent

    return Descent(problem, seed=seed)


def _gp(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .gp import GeneticProgramming  # imports DEAP

    return GeneticProgramming(problem, seed=seed)


def _nsga3(problem: Problem, seed: int, batch: int) -> Searcher:
    from .nsga3 import NSGA3Searcher  # imports pymoo

    return NSGA3Searcher(problem, seed=seed, batch=batch)


def _tpe(problem: Problem, seed: int, _batch: int) -> Searcher:
    from .tpe import TPESearcher  # imports Optuna

    return TPESearcher(problem, seed=seed)


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


SEARCHERS: dict[str, SearcherRow] = {
    row.name: row
    for row in (
        SearcherRow("descent", _descent, "steps along the sensitivities of all layers", DESCENT),
        SearcherRow("gp", _gp, "genetic programming, with descent in ratios that vary beside metrics", GP),
        SearcherRow("nsga3", _nsga3, "NSGA-III, a front along reference directions", NSGA3),
        SearcherRow("tpe", _tpe, "tree-structured Parzen estimation", TPE),
        SearcherRow("evolution", _evolution, "an elite and its mutations, after EvoPress", EVOLUTION),
        SearcherRow("cma", _cma, "covariance matrix adaptation", CMA),
        SearcherRow("random", _random, "independent draws"),
        SearcherRow("grid", _grid, "even steps, halved", GRID),
    )
}


class _Guarded:
    """A searcher of somebody else's whose failures are sentences."""

    def __init__(self, searcher: Searcher, problem: Problem, what: str) -> None:
        self._searcher = searcher
        self._layers = len(problem.layers)
        self._what = what

    def ask(self, count: int) -> list[Candidate]:
        """Return what it proposes."""
        asked = list(guarded(self._searcher.ask, self._what)(count))
        for candidate in asked:
            ratios = getattr(candidate, "ratios", ())
            if len(ratios) != self._layers:
                raise SecateurError(
                    f"{self._what} fails: expected candidates with {self._layers} ratios, one a layer, got "
                    f"{type(candidate).__name__} with {len(ratios)}"
                )
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Pass trials on."""
        guarded(self._searcher.tell, self._what)(trials)


def _admitted(row: SearcherRow, origin: str) -> SearcherRow:
    """Return a searcher of somebody else's, held to what its row says that it can."""
    what = f"the searcher {row.name} of {origin}"
    if row.name == AUTO or not isinstance(row.can, Abilities):
        raise SecateurError(f"expected Abilities for {row.name} and another name than {AUTO}")

    def build(problem: Problem, seed: int, batch: int) -> Searcher:
        row.can.check(row.name, problem)
        found = guarded(row.build, what)(problem, seed, batch)
        for method in ("ask", "tell"):
            if not callable(getattr(found, method, None)):
                raise SecateurError(
                    f"{what} fails: expected its row to build a searcher with ask and tell, got "
                    f"{type(found).__name__} without {method}"
                )
        return _Guarded(found, problem, what)

    return replace(row, build=build)


AUTO = "auto"  # stands for the searcher that is chosen for what is searched


open_table(SEARCHERS, SearcherRow, "a searcher", "searchers", _admitted)


def searchers_help() -> str:
    """Return what a help text says of the searchers."""
    rows = "; ".join(f"{row.name}: {row.meaning}" for row in SEARCHERS.values())
    return f"{AUTO}: chosen for what is searched. Or {rows}."


def batches_help() -> str:
    """Return what a help text says of the candidates that are asked for at a time."""
    own = [f" or {r.can.batch} for {r.name}" for r in SEARCHERS.values() if r.can.batch != defaults.BATCH]
    return f"Candidates asked for at a time; {defaults.BATCH},{''.join(own)}, if left out."


def build_searcher(name: str, problem: Problem, seed: int, batch: int = defaults.BATCH) -> Searcher:
    """Return a new searcher by name.

    Raises:
        SecateurError: For an unknown name, or a problem that the searcher cannot represent.
    """
    from ..core.objectives import look_up  # imports NumPy

    return look_up(SEARCHERS, name, "a searcher").build(problem, seed, batch)
