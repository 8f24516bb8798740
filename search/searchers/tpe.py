"""Tree-structured Parzen estimation over numbers and choices, with Optuna."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from ..core.candidate import Candidate, Trial
from ..core.objectives import rung_point
from ..spaces.problem import Problem
from ..spaces.variables import Encoding
from .abilities import TPE


class TPESearcher:
    """Optuna's multi-objective TPE, its study kept in memory.

    All are told with their figures on the first rung's tokens, where there is one: TPE learns from what
    the funnel rejects as from what it promotes, and they have no others in common.

    Args:
        problem: Has numbers or choices to search, and no trees.
        seed: Seed of the sampler.

    Raises:
        SecateurError: When trees are searched, or nothing is.
    """

    def __init__(self, problem: Problem, *, seed: int) -> None:
        TPE.check("tpe", problem)
        self._problem = problem
        names = [f"{i} {variable.name}" for i, variable in enumerate(problem.variables)]
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(tuple(range(len(v.choices))))
            if v.choices
            else FloatDistribution(v.low, v.high)
            for name, v in zip(names, problem.variables, strict=True)
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # not a line a trial
        self._study = optuna.create_study(
            directions=["minimize"] * len(problem.objectives),
            sampler=TPESampler(seed=seed, multivariate=True, constant_liar=True),
        )
        for encoding in problem.seeds:
            pairs = zip(problem.variables, encoding.values, strict=True)
            typed = [int(value) if variable.choices else value for variable, value in pairs]
            self._study.enqueue_trial(dict(zip(names, typed, strict=True)))
        self._asked: dict[str, list[Any]] = defaultdict(list)

    def ask(self, count: int) -> list[Candidate]:
        """Return ``count`` samples, the seeds first."""
        candidates = []
        for _ in range(count):
            trial = self._study.ask(self._distributions)
            values = tuple(float(trial.params[name]) for name in self._distributions)
            candidate = self._problem.candidate(Encoding(None, values))
            self._asked[candidate.key].append(trial)
            candidates.append(candidate)
        return candidates

    def tell(self, trials: Sequence[Trial]) -> None:
        """Add what was found out to the study."""
        objectives = self._problem.objectives
        for trial in trials:
            waiting = self._asked.get(trial.candidate.key)
            if not waiting:
                continue
            values = rung_point(trial, objectives)
            if values is None:
                self._study.tell(waiting.pop(0), state=TrialState.FAIL)
            else:
                self._study.tell(waiting.pop(0), values)
