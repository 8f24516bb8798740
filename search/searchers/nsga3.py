"""NSGA-III over numbers and choices, with pymoo (Deb and Jain 2014)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.core.mixed import (
    MixedVariableDuplicateElimination,
    MixedVariableMating,
)
from pymoo.core.population import Population
from pymoo.core.problem import Problem as PymooProblem
from pymoo.core.variable import Choice, Real
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.util.ref_dirs import get_reference_directions

from ..core import defaults
from ..core.candidate import Candidate, Trial
from ..core.objectives import point
from ..spaces.problem import Problem
from ..spaces.variables import Encoding, draw
from . import abilities

_FEWEST = 8  # measured points from which the population starts


class NSGA3Searcher:
    """Reference directions spread the population over the front, for any number of objectives.

    Until a few points are measured it asks for the seeds and random ones. What failed or was
    rejected does not enter the population: pymoo ranks NaN as if it were a number.

    Args:
        problem: Has numbers or choices to search, and no trees.
        seed: Seed of the searcher's own generators.
        batch: Offspring a generation.

    Raises:
        SecateurError: When trees are searched, or nothing is.
    """

    def __init__(self, problem: Problem, *, seed: int, batch: int = defaults.BATCH) -> None:
        abilities.NSGA3.check("nsga3", problem)
        self._problem = problem
        self._rng = random.Random(seed)
        self._seed, self._batch = seed, batch
        self._waiting: list[Encoding] = list(problem.seeds)
        self._asked: dict[str, Encoding] = {}
        self._told: dict[Encoding, tuple[float, ...]] = {}
        self._algorithm: Any = None

    def ask(self, count: int) -> list[Candidate]:
        """Return up to ``count`` members of the next generation."""
        if not self._waiting:
            self._waiting = self._generation(count)
        encodings, self._waiting = self._waiting[:count], self._waiting[count:]
        candidates = [self._problem.candidate(encoding) for encoding in encodings]
        self._asked.update((c.key, g) for c, g in zip(candidates, encodings, strict=True))
        return candidates

    def tell(self, trials: Sequence[Trial]) -> None:
        """Keep what was measured to the end for the next selection."""
        for trial in trials:
            values = point(trial, self._problem.objectives)
            encoding = self._asked.get(trial.candidate.key)
            if values is not None and encoding is not None:
                self._told[encoding] = values

    def _generation(self, count: int) -> list[Encoding]:
        variables = self._problem.variables
        if self._algorithm is None:
            if len(self._told) < _FEWEST:
                return [Encoding(None, draw(variables, self._rng)) for _ in range(count)]
            self._algorithm = _algorithm(self._problem, self._population(), self._seed, self._batch)
            self._algorithm.ask()  # is the population that it was given
        if self._told:
            self._algorithm.tell(infills=self._population())
            self._told.clear()
        offspring = self._algorithm.ask()
        found = [] if offspring is None else [tuple(float(x[n]) for n in _names(variables))
                                              for x in offspring.get("X")]  # fmt: skip
        return [Encoding(None, values) for values in found] or [Encoding(None, draw(variables, self._rng))]

    def _population(self) -> Any:
        names = _names(self._problem.variables)
        x = np.empty(len(self._told), dtype=object)
        x[:] = [dict(zip(names, _typed(self._problem, encoding), strict=True)) for encoding in self._told]
        return Population.new("X", x, "F", np.array(list(self._told.values())))


def _names(variables: Sequence[object]) -> list[str]:
    return [f"v{i}" for i in range(len(variables))]


def _typed(problem: Problem, encoding: Encoding) -> list[float | int]:
    pairs = zip(problem.variables, encoding.values, strict=True)
    return [int(value) if variable.choices else value for variable, value in pairs]


def _by_chance(_population: Any, pairs: np.ndarray, **_: Any) -> np.ndarray:
    """Return the first of each pair: pairs are drawn by chance, and NSGA-III mates by chance.

    pymoo's own comparator draws from a generator without a seed (pymoo issue 794).
    """
    return pairs[:, [0]]


def _algorithm(problem: Problem, population: Any, seed: int, batch: int) -> Any:
    count = len(problem.objectives)
    if count == 1:
        directions = np.ones((1, 1))
    elif count <= 3:
        directions = get_reference_directions("das-dennis", count, n_partitions=19 if count == 2 else 5)
    else:
        directions = get_reference_directions("energy", count, 30, seed=1)
    distinct = MixedVariableDuplicateElimination()
    algorithm = NSGA3(
        ref_dirs=directions,
        pop_size=max(20, len(directions)),
        n_offsprings=batch,
        sampling=population,
        selection=TournamentSelection(func_comp=_by_chance),
        mating=MixedVariableMating(
            selection=TournamentSelection(func_comp=_by_chance), eliminate_duplicates=distinct
        ),
        eliminate_duplicates=distinct,
    )
    pairs = zip(_names(problem.variables), problem.variables, strict=True)
    variables = {
        name: Choice(options=list(range(len(v.choices)))) if v.choices else Real(bounds=(v.low, v.high))
        for name, v in pairs
    }
    algorithm.setup(
        PymooProblem(vars=variables, n_obj=count), seed=seed, termination=("n_gen", 10**9), verbose=False
    )
    return algorithm
