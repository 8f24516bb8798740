"""Covariance matrix adaptation over numbers (CMA-ES; Hansen 2016, arXiv 1604.00772)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.candidate import Candidate, Trial
from ..core.objectives import rung_point
from ..spaces.problem import Problem
from ..spaces.variables import Encoding
from .abilities import CMA

_Floats = NDArray[np.float64]
_FIRST_STEP = 0.12  # of a number's range


class CovarianceAdaptation:
    """Samples a normal distribution that learns where good candidates lie, and in which directions.

    A generation is a batch. It begins with the distribution's mean, which is usually better than any
    sample; the others teach the distribution by their rank. Ranks come from the tokens that all of
    a batch have run on, the first rung's, so what the funnel rejects teaches as much as what it promotes.

    Args:
        problem: One objective, and numbers to search.
        seed: Seed of the searcher's own generator.

    Raises:
        SecateurError: When there are trees, choices or several objectives.
    """

    def __init__(self, problem: Problem, *, seed: int) -> None:
        CMA.check("cma", problem)
        variables = problem.variables
        self._problem = problem
        self._rng = np.random.default_rng(seed)
        self._low = np.array([v.low for v in variables])
        self._range = np.array([v.high - v.low for v in variables])
        self._seeds = [self._inside(np.array(seed.values)) for seed in problem.seeds]
        self._is_opening = bool(self._seeds)
        self._opened: list[tuple[float, _Floats]] = []
        self._asked: dict[str, _Floats] = {}
        n = len(variables)
        self._mean = np.full(n, 0.5)
        self._step = _FIRST_STEP
        self._covariance = np.eye(n)
        self._path = self._step_path = np.zeros(n)
        self._generation = 0

    def ask(self, count: int) -> list[Candidate]:
        """Return the seeds at first, then the mean and samples around it."""
        if self._seeds:
            points, self._seeds = self._seeds[:count], self._seeds[count:]
        else:
            values, axes = np.linalg.eigh(self._covariance)
            normal = self._rng.standard_normal((max(count - 1, 0), len(self._mean)))
            steps = normal * np.sqrt(np.maximum(values, 1e-20)) @ axes.T
            points = [self._mean, *np.clip(self._mean + self._step * steps, 0.0, 1.0)]
        candidates = [self._problem.candidate(Encoding(None, self._outside(point))) for point in points]
        self._asked.update((c.key, p) for c, p in zip(candidates, points, strict=True))
        return candidates

    def tell(self, trials: Sequence[Trial]) -> None:
        """Move the distribution towards the better half of a batch."""
        found: list[tuple[float, _Floats]] = []
        for trial in trials:
            values = rung_point(trial, self._problem.objectives)
            if values is not None and trial.candidate.key in self._asked:
                found.append((values[0], self._asked[trial.candidate.key]))
        found.sort(key=lambda pair: pair[0])
        self._asked.clear()
        if self._is_opening:
            self._opened += found[:1]
            if self._opened:
                self._mean = min(self._opened, key=lambda pair: pair[0])[1]
            self._is_opening = bool(self._seeds)
            return
        found = [pair for pair in found if not np.array_equal(pair[1], self._mean)]
        if len(found) >= 4:
            self._learn(np.array([point for _, point in found]))

    def _learn(self, points: _Floats) -> None:
        """Update mean, paths, covariance and step from points in order of rank: Hansen's equations."""
        n = len(self._mean)
        chosen = points[: len(points) // 2]
        weights = math.log(len(points) / 2 + 0.5) - np.log(np.arange(1, len(chosen) + 1))
        weights /= weights.sum()
        effective = 1 / float(weights @ weights)
        c_path = (4 + effective / n) / (n + 4 + 2 * effective / n)
        c_step = (effective + 2) / (n + effective + 5)
        c_one = 2 / ((n + 1.3) ** 2 + effective)
        c_mu = min(1 - c_one, 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective))
        damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (n + 1)) - 1) + c_step
        steps = (chosen - self._mean) / self._step
        move = weights @ steps
        values, axes = np.linalg.eigh(self._covariance)
        whitened = axes @ ((axes.T @ move) / np.sqrt(np.maximum(values, 1e-20)))
        self._step_path = (1 - c_step) * self._step_path
        self._step_path = self._step_path + math.sqrt(c_step * (2 - c_step) * effective) * whitened
        length = float(np.linalg.norm(self._step_path))
        expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        self._generation += 1
        settled = math.sqrt(1 - (1 - c_step) ** (2 * self._generation))
        is_slow = length / settled < (1.4 + 2 / (n + 1)) * expected
        self._path = (1 - c_path) * self._path
        if is_slow:
            self._path = self._path + math.sqrt(c_path * (2 - c_path) * effective) * move
        kept = 1 - c_one - c_mu + (0.0 if is_slow else c_one * c_path * (2 - c_path))
        self._covariance = (
            kept * self._covariance
            + c_one * np.outer(self._path, self._path)
            + c_mu * (steps.T * weights) @ steps
        )
        self._mean = self._mean + self._step * move
        self._step = min(self._step * math.exp((c_step / damping) * (length / expected - 1)), 0.5)

    def _inside(self, values: _Floats) -> _Floats:
        return np.asarray((values - self._low) / np.where(self._range > 0, self._range, 1.0))

    def _outside(self, point: _Floats) -> tuple[float, ...]:
        return tuple(map(float, self._low + point * self._range))
