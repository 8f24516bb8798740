"""Descent: steps of all ratios at once, along what the evaluator says of each layer's sensitivity.

At the best ratios under a budget, taking one more weight from any layer costs the same: were one layer's
price lower, its weights should go instead of another's. Descent moves each ratio by the logarithm of its
layer's price over the mean price, as far as prices are known, and holds the budget. Where removing weights
grows dearer exponentially, as it about does, equal steps in that logarithm are equal steps to the goal,
and a price that is off by a factor, as estimates from a few tokens are, does no harm.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from ...metrics_dsl.errors import SecateurError
from ..core.candidate import Candidate, Layer, Trial
from ..spaces.problem import Problem
from ..spaces.ratio_space import LinearSpace
from ..spaces.ratios import project, sizes
from ..spaces.variables import Encoding, Values
from .abilities import DESCENT

_Floats = NDArray[np.float64]
_MEMORY = 0.6  # how much of the mean of earlier prices each new estimate leaves
_FARTHEST = 10.0  # a price counts as at most this many times the mean price, and at least a part of it
_FIRST_STEP, _LEAST_STEP, _LARGEST_STEP = 0.03, 0.002, 0.12
_LENGTHS = (1.0, 0.5, 2.0)  # of the step, tried in one batch
_PATH = 24  # points that are remembered; the mean of the later half is tried
_SPARSITIES = 16  # of an interval, evenly; each pass through it visits every third of them
_TRIES = 3  # batches at a sparsity that bring nothing, after which it is left


class MarginalCosts:
    """What one more weight costs in each layer, relative to the mean over layers.

    Args:
        layers: The prunable layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._sizes = sizes(layers)
        self._sum = np.zeros(len(layers))
        self._weight = 0.0

    @property
    def known(self) -> bool:
        """Whether any sensitivities have been learned."""
        return self._weight > 0

    def learn(self, sensitivities: Sequence[float]) -> None:
        """Join the sensitivities of a candidate, (layers,), with those of the ones before."""
        found = np.asarray(sensitivities, dtype=np.float64)
        mean = float(found.sum() / self._sizes.sum())
        if not (math.isfinite(mean) and mean > 0):
            return  # pruning everywhere seems to help: noise, which says nothing
        self._sum = _MEMORY * self._sum + (1 - _MEMORY) * found / self._sizes / mean
        self._weight = _MEMORY * self._weight + 1 - _MEMORY

    def move(self, ratios: Sequence[float], step: float, sparsity: float) -> _Floats:
        """Return ratios from which costly layers have moved down and cheap ones up, (layers,)."""
        relative = np.clip(self._sum / self._weight, 1 / _FARTHEST, _FARTHEST)
        return project(np.asarray(ratios) - step * np.log(relative), self._sizes, sparsity)


class RatioDescent:
    """A way down in ratios: from point to point along the prices, each batch trying some next ones.

    A batch tries some lengths of the step and the mean of the path, which is better than its points where
    estimates are noisy. The best of them is the next point, and what won says whether steps should grow.

    Args:
        problem: KL as the first objective, and a linear space of ratios.
        rng: Draws from here.
        sparsity: What the first points hold.

    Attributes:
        sparsity: What the next points hold; it may change from batch to batch.
    """

    def __init__(self, problem: Problem, rng: random.Random, sparsity: float) -> None:
        assert isinstance(problem.ratios, LinearSpace)
        self.sparsity = sparsity
        self._space = problem.ratios
        self._sizes = sizes(problem.layers)
        self._rng = rng
        self._prices = MarginalCosts(problem.layers)
        self._path: deque[tuple[float, ...]] = deque(maxlen=_PATH)
        self._step = _FIRST_STEP
        self._lengths: dict[tuple[float, ...], float] = {}  # ratios that were asked -> length of their step
        self._learned: set[str] = set()
        self.batches_without_progress = 0  # batches since anything was learned

    @property
    def begun(self) -> bool:
        """Whether there is a point to go on from and prices are known."""
        return self._prices.known and bool(self._path)

    def ask(self, count: int) -> list[Values]:
        """Return the values of up to ``count`` next points; of one near the middle before it has begun."""
        if not self.begun:
            return [self._values([self._rng.gauss(self.sparsity, _FIRST_STEP) for _ in self._sizes])]
        here = self._path[-1]
        found = []
        for length in _LENGTHS[: max(1, count - 1)]:
            step = self._step * length
            ratios = self._prices.move(here, step, self.sparsity)
            if self.batches_without_progress:  # nothing new came of the last batch: look beside the way
                ratios = ratios + [self._rng.gauss(0, step * self.batches_without_progress) for _ in ratios]
            found.append(self._values(ratios, length))
        if count > 1 and len(self._path) > 2:
            found.append(self._values(np.mean(list(self._path)[len(self._path) // 2 :], axis=0), 0.0))
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        """Go on from the candidate whose sensitivities were found; what is told again says nothing new."""
        moved = False
        for trial in trials:
            key = trial.candidate.key
            if not trial.measurement.sensitivities or trial.alias_of or key in self._learned:
                continue
            self._learned.add(key)
            self._prices.learn(trial.measurement.sensitivities)
            moved = True
            if trial.candidate.ratios in self._path:  # with another metric
                continue
            self._path.append(trial.candidate.ratios)
            length = self._lengths.get(trial.candidate.ratios, 1.0)
            # The mean of the path wins where steps lead nowhere but around: they are too long.
            factor = {0.0: 0.7, 0.5: 0.7, 2.0: 1.4}.get(length, 1.0)
            self._step = min(max(self._step * factor, _LEAST_STEP), _LARGEST_STEP)
        self.batches_without_progress = 0 if moved else min(self.batches_without_progress + 1, 5)

    def _values(self, ratios: _Floats | Sequence[float], length: float = 1.0) -> Values:
        values = self._space.encode(project(ratios, self._sizes, self.sparsity), self.sparsity)
        self._lengths.setdefault(self._space.ratios(values, self.sparsity), length)
        return values


class Descent:
    """Walks down in the ratios of a given metric, over an interval at one sparsity after the other.

    What is learned at one sparsity serves at the next.

    Args:
        problem: A given metric, KL as the first objective, and a linear space of ratios.
        seed: Seed of the searcher's own generator.

    Raises:
        SecateurError: For any other problem.
    """

    def __init__(self, problem: Problem, *, seed: int) -> None:
        if not (can_descend(problem) and DESCENT.can_vary(problem.varied)):
            raise SecateurError(
                "expected a given metric, the objective kl first and a space of ratios such as layer for the "
                "searcher descent; choose another --searcher, or --searcher gp to descend in ratios while "
                "metrics vary"
            )
        self._problem = problem
        self._next: Iterator[float] | None = None  # sparsities to come, over an interval
        if isinstance(problem.sparsity, float):
            first = problem.sparsity
        else:
            self._next = cycle(_visits(*problem.sparsity))
            first = next(self._next)
        self._walk = RatioDescent(problem, random.Random(seed), first)
        self._seeds = list(problem.seeds)

    def ask(self, count: int) -> list[Candidate]:
        """Return the seeds, or a point near the middle, until prices are known; then the next points."""
        if not self._walk.begun and self._seeds:
            asked, self._seeds = self._seeds[:count], self._seeds[count:]
            return [self._problem.candidate(encoding) for encoding in asked]
        own = (self._walk.sparsity,) if self._next else ()
        return [self._problem.candidate(Encoding(None, (*found, *own))) for found in self._walk.ask(count)]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Go on from the candidate whose sensitivities were found, over an interval at the next sparsity."""
        had_begun = self._walk.begun
        self._walk.tell(trials)
        if self._next and had_begun and self._walk.batches_without_progress in (0, _TRIES):
            self._walk.sparsity, self._walk.batches_without_progress = next(self._next), 0


def _visits(low: float, high: float) -> list[float]:
    """Return the sparsities of an interval in the order of visits, up and down by turns.

    Three passes visit all, each those between the ones before, so that a budget that ends early leaves no
    part empty; the next three visit them the other way round. Neighbours in time are near each other. All but
    the ends have four places, as densities are compared, so that rounding to columns makes no difference.
    """
    inner = [round(float(sparsity), 4) for sparsity in np.linspace(low, high, _SPARSITIES)[1:-1]]
    even = [low, *inner, high]
    passes = [even[i % 3 :: 3] for i in range(6)]
    return [sparsity for i, own in enumerate(passes) for sparsity in (own[::-1] if i % 2 else own)]


def descent_at_one_sparsity(problem: Problem, rng: random.Random) -> RatioDescent | None:
    """Return a walk, None over an interval, where each candidate has a sparsity of its own."""
    if not (can_descend(problem) and isinstance(problem.sparsity, float)):
        return None
    return RatioDescent(problem, rng, problem.sparsity)


def can_descend(problem: Problem) -> bool:
    """Whether sensitivities, which are those of KL, lead anywhere in a problem's ratios."""
    return isinstance(problem.ratios, LinearSpace) and problem.objectives[0].name == "kl"
