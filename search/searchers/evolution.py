"""Evolution of numbers: mutation around an elite, with moves that keep the budget where there are any.

After EvoPress (Sieberling et al. 2025, arXiv 2410.14649): offspring of a small elite, and in spaces of one
number a layer or block, moves of weights from one to another. The racing is the funnel's: offspring
are compared on the same few tokens, and the best of them with the elite on all selection tokens. These are
the same for every generation, so an elite's earlier figures stand and need not be measured again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..core.candidate import Candidate, Trial
from ..core.objectives import point
from ..core.selection import best_first
from ..spaces.problem import Problem
from ..spaces.ratio_space import LinearSpace
from ..spaces.ratios import sizes
from ..spaces.variables import Encoding, Values, blend, draw, mutate
from .abilities import EVOLUTION

_FIRST_STEP, _LEAST_STEP, _LARGEST_STEP = 0.15, 0.004, 0.5


class _Member(NamedTuple):
    encoding: Encoding
    step: float
    point: tuple[float, ...]


class Evolution:
    """A (mu + lambda) evolution strategy whose step size is inherited, and so adapts itself.

    Args:
        problem: Has numbers or choices to search, and no trees.
        seed: Seed of the searcher's own generator.
        elite: Members that are kept as parents; by default 6 for one objective, 24 for several.

    Raises:
        SecateurError: When trees are searched, or nothing is.
    """

    def __init__(self, problem: Problem, *, seed: int, elite: int = 0) -> None:
        EVOLUTION.check("evolution", problem)
        self._problem = problem
        self._rng = random.Random(seed)
        self._elite = elite or (6 if len(problem.objectives) == 1 else 24)
        self._waiting = list(problem.seeds)
        self._members: list[_Member] = []
        self._asked: dict[str, tuple[Encoding, float]] = {}
        self._weights = self._exchanged()

    def ask(self, count: int) -> list[Candidate]:
        """Return the seeds first, then offspring of the elite."""
        candidates = []
        for _ in range(count):
            candidate = None
            for _attempt in range(20):  # an offspring not asked before, if that is found soon
                encoding, step = self._next()
                candidate = self._problem.candidate(encoding)
                if candidate.key not in self._asked:
                    self._asked[candidate.key] = encoding, step
                    break
            assert candidate is not None
            candidates.append(candidate)
        return candidates

    def tell(self, trials: Sequence[Trial]) -> None:
        """Let what was measured to the end compete with the elite."""
        present = {member.encoding for member in self._members}
        for trial in trials:
            values = point(trial, self._problem.objectives)
            encoding, step = self._asked.get(trial.candidate.key, (None, 0.0))
            if values is not None and encoding is not None and encoding not in present:
                present.add(encoding)
                self._members.append(_Member(encoding, step, values))
        order = best_first([member.point for member in self._members])
        self._members = [self._members[i] for i in order[: self._elite]]

    def _next(self) -> tuple[Encoding, float]:
        if self._waiting:
            return self._waiting.pop(0), _FIRST_STEP
        variables = self._problem.variables
        if not self._members:
            return Encoding(None, draw(variables, self._rng)), _FIRST_STEP
        # The first of two: better members have more offspring.
        parent = self._members[min(self._rng.randrange(len(self._members)) for _ in range(2))]
        step = parent.step * math.exp(self._rng.gauss(0, 0.4))
        step = min(max(step, _LEAST_STEP), _LARGEST_STEP)
        values = parent.encoding.values
        kind = self._rng.random()
        if self._weights is not None and self._rng.random() < 0.7:
            values = self._move_weights(values, step)
        elif len(self._members) >= 4 and kind < 0.35:
            values = self._along_a_difference(values)
        elif len(self._members) >= 2 and kind < 0.5:
            values = blend(variables, values, self._rng.choice(self._members).encoding.values, self._rng)
        else:
            values = mutate(variables, values, self._rng, step)
        return Encoding(None, values), step

    def _along_a_difference(self, values: Values) -> Values:
        """Move by a share of what two members differ in: the elite's own shape scales the step."""
        first, second = self._rng.sample(self._members, 2)
        share = self._rng.uniform(0.3, 0.9)
        moved = []
        for i, variable in enumerate(self._problem.variables):
            a, b = first.encoding.values[i], second.encoding.values[i]
            noise = self._rng.gauss(0, 0.01) * (variable.high - variable.low)
            moved.append(
                values[i] if variable.choices else variable.clip(values[i] + share * (a - b) + noise)
            )
        return tuple(moved)

    def _exchanged(self) -> tuple[int, np.ndarray] | None:
        """Return where the numbers that can exchange weights begin, and the weights of each."""
        space = self._problem.ratios
        if not (isinstance(space, LinearSpace) and space.exchange):
            return None
        return len(self._problem.metric_variables), space.matrix.T @ sizes(space.layers)

    def _move_weights(self, values: Values, step: float) -> Values:
        """Move weights between one to three pairs of layers or blocks; the budget stays."""
        assert self._weights is not None
        start, weights = self._weights
        changed = list(values)
        for _ in range(min(self._rng.randint(1, 3), self._rng.randint(1, 3))):
            pair = self._rng.sample(range(len(weights)), 2) if len(weights) > 1 else []
            amount = step * min((weights[i] for i in pair), default=0.0)
            for i, sign in zip(pair, (1, -1), strict=False):
                variable = self._problem.variables[start + i]
                changed[start + i] = variable.clip(changed[start + i] + sign * amount / weights[i])
        return tuple(changed)
