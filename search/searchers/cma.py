"""Covariance matrix adaptation over numbers (CMA-ES; Hansen 2016, arXiv 1604.00772), by the library pycma."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.candidate import Candidate, Trial
from ..core.objectives import rung_point
from ..spaces.problem import Problem
from ..spaces.variables import Encoding
from .abilities import CMA

_Floats = NDArray[np.float64]
_FIRST_STEP = 0.12  # of a number's range
_LARGEST_STEP = 0.5
_FEWEST = 4  # of a generation


class CovarianceAdaptation:
    """Samples a normal distribution that learns where good candidates lie, and in which directions.

    A generation is a batch. It begins with the distribution's mean, which is usually better than any
    sample; the others teach the distribution by their rank. Ranks come from the tokens that all of
    a batch have run on, the first rung's, so what the funnel rejects teaches as much as what it promotes.

    Args:
        problem: One objective, and numbers to search.
        seed: Seed of the searcher's own generator.
        batch: Candidates asked for at a time; of fewer a generation takes several batches.

    Raises:
        SecateurError: When there are trees, choices or several objectives.
    """

    def __init__(self, problem: Problem, *, seed: int, batch: int) -> None:
        CMA.check("cma", problem)
        variables = problem.variables
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._low = np.array([v.low for v in variables])
        self._range = np.array([v.high - v.low for v in variables])
        self._seeds = [self._inside(np.array(seed.values)) for seed in problem.seeds]
        self._generation = max(batch - 1, _FEWEST)
        self._start: tuple[float, _Floats] = (math.inf, np.full(len(variables), 0.5))
        self._strategy: Any = None  # begins where the best of the seeds is
        self._asked: dict[str, _Floats] = {}
        self._told: list[tuple[float, _Floats]] = []

    def ask(self, count: int) -> list[Candidate]:
        """Return the seeds at first, then the mean and samples around it."""
        mean = []
        if self._seeds:
            samples, self._seeds = self._seeds[:count], self._seeds[count:]
        else:
            self._strategy = self._strategy or self._begin()
            mean = [self._strategy.result.xfavorite]
            samples = self._strategy.ask(count - 1) if count > 1 else []
        candidates = [self._problem.candidate(Encoding(None, self._outside(p))) for p in mean + samples]
        self._asked = {c.key: p for c, p in zip(candidates[len(mean) :], samples, strict=True)}
        return candidates

    def tell(self, trials: Sequence[Trial]) -> None:
        """Move the distribution towards the better half of a generation; a failure ranks with the worst."""
        own = [trial for trial in trials if trial.candidate.key in self._asked]
        found = [rung_point(trial, self._problem.objectives) for trial in own]
        worst = max((values[0] for values in found if values), default=math.inf)
        points = [self._asked[trial.candidate.key] for trial in own]
        told = [(values[0] if values else worst, p) for values, p in zip(found, points, strict=True)]
        if self._strategy is None:
            self._start = min([self._start, *told], key=lambda pair: pair[0])
        elif worst < math.inf:
            self._told += told
        if len(self._told) >= self._generation:
            values, samples = zip(*self._told[: self._generation], strict=True)
            self._strategy.tell(samples, values)
            self._told.clear()

    def _begin(self) -> Any:
        from cma import CMAEvolutionStrategy  # takes long

        options = {
            "bounds": [0, 1],
            "popsize": self._generation,
            "maxstd": _LARGEST_STEP,
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "seed": math.nan,  # leave NumPy's own generator alone
            "verbose": -9,
        }
        return CMAEvolutionStrategy(self._start[1], _FIRST_STEP, options)

    def _inside(self, values: _Floats) -> _Floats:
        found: _Floats = (values - self._low) / np.where(self._range > 0, self._range, 1.0)
        return found.clip(0.0, 1.0)

    def _outside(self, point: _Floats) -> tuple[float, ...]:
        return tuple(map(float, self._low + point * self._range))
