"""The opening of a run: published rules, asked first, as its baselines and as seeds of its searcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.expression import Expression
from ..metrics_dsl.operators import LEAVES, OPERATORS
from ..metrics_dsl.plugins import fill
from ..metrics_dsl.published import PUBLISHED
from .core.candidate import Candidate, Trial
from .core.objectives import look_up_objectives
from .core.protocols import Evaluator, Searcher
from .loop import INDIFFERENCE, Funnel
from .settings import SearchSettings
from .spaces.allocation import ALLOCATIONS, Dense
from .spaces.metric_space import MetricSpace
from .spaces.optishear import MetaSpace
from .spaces.problem import FixedRatios, Problem
from .spaces.ratio_space import RATIO_SPACES, RatioSpace
from .spaces.variables import Encoding

_SPARSITIES = 3  # of an interval, at which published rules are measured
_RAMPS_AS_SEEDS = 3  # slopes a direction


@dataclass(frozen=True)
class Baseline:
    """A published rule under the name that tables show.

    ``is_one`` says that it stands for itself: the slopes of a ramp are many, of which only those that the
    funnel promotes are measured to the end.
    """

    name: str
    metric: Expression
    ratios: tuple[float, ...]
    sparsity: float
    is_one: bool = True


def check_leaves(settings: SearchSettings, leaves: frozenset[str]) -> None:
    """Check that a calibration has what the given metric, or metrics of the leaves that are named, need.

    Raises:
        SecateurError: When it lacks a leaf.
    """
    if absent := [name for name in settings.leaves or () if name not in leaves]:
        raise SecateurError(
            f"expected leaves that the calibration has ({', '.join(n for n in LEAVES if n in leaves)}), got "
            f"{', '.join(absent)}; calibrate with gradients or leave it out of the leaves"
        )
    missing = settings.given_metric.leaves - leaves
    if missing and not settings.metric_space:
        raise SecateurError(
            f"expected a metric of the calibration's leaves, got {settings.given_metric}, which needs "
            f"{', '.join(sorted(missing))}; calibrate with gradients"
        )


def build_problem(
    settings: SearchSettings, evaluator: Evaluator, starts: Sequence[Expression] = ()
) -> tuple[Problem, list[Baseline]]:
    """Return what the settings say to search, and the published rules to compare with.

    Args:
        settings: What to search.
        evaluator: Knows the layers and leaves.
        starts: Metrics that the searcher asks for first.

    Raises:
        SecateurError: When a start is none of the metrics that are searched.
    """
    fill(OPERATORS, LEAVES, PUBLISHED, ALLOCATIONS)
    metric = settings.given_metric
    wanda = PUBLISHED["wanda"].expression
    dense = Dense(evaluator.layers, evaluator.summarise, wanda if settings.metric_space else metric)
    metrics: MetricSpace | MetaSpace | Expression = metric
    if settings.metric_space == "meta":
        metrics = MetaSpace(settings.group)
    elif settings.metric_space:
        leaves = frozenset(settings.leaves or evaluator.leaves)
        operators = frozenset(settings.operators) if settings.operators else None
        metrics = MetricSpace(leaves, settings.group, settings.max_size, operators=operators)
    ratios: RatioSpace = _fixed(settings, dense)
    if settings.ratio_space:
        ratios = RATIO_SPACES[settings.ratio_space](dense)
    found = baselines(settings, dense, evaluator)
    objectives = look_up_objectives(settings.objectives)
    problem = Problem(metrics, ratios, objectives, settings.sparsity, settings.group, phase=settings.phase)
    if settings.seeding and problem.variables:
        problem = replace(problem, seeds=seeds(problem, found))
    own = [encoding for start in starts for encoding in _of_start(problem, start, settings, dense)]
    return replace(problem, starts=list(dict.fromkeys(own))), found


def _of_start(problem: Problem, start: Expression, settings: SearchSettings, dense: Dense) -> list[Encoding]:
    """Return the encodings of a metric to begin with, at the ratios of the published ones."""
    fixed = _fixed(settings, dense)
    found = [problem.encoding(start, fixed.ratios((), s), s) for s in _targets(settings)]
    if problem.trees is None or None in found:
        raise SecateurError(
            f"expected metrics of the searched space to start from, got `{start}`, which uses "
            f"{', '.join(sorted(start.leaves | start.operators))} and has {start.size} nodes; name its words "
            "among the leaves and operators, give a larger --max-size, or start from another one"
        )
    return [encoding for encoding in found if encoding is not None]


def _targets(settings: SearchSettings) -> list[float]:
    """Return the sparsities at which published rules are measured."""
    if isinstance(settings.sparsity, tuple):
        return [float(target) for target in np.linspace(*settings.sparsity, _SPARSITIES)]
    return [settings.sparsity]


def build_funnel(
    settings: SearchSettings, always: list[str], rungs: tuple[int, ...] = (), sensitivity: int = 0
) -> Funnel:
    """Return the funnel: layer errors screen metrics, and race on few tokens everything with ratios."""
    screen: float | None = INDIFFERENCE
    if isinstance(settings.sparsity, tuple) or not settings.metric_space:
        screen = None  # a layer's error says nothing of how to share a budget between layers
    if settings.stage == "screen":
        screen = INDIFFERENCE
    objectives = look_up_objectives(settings.objectives)
    return Funnel(
        objectives, settings.batch_size, settings.promote, settings.stage, frozenset(always), screen, rungs,
        sensitivity,
    )  # fmt: skip


def _fixed(settings: SearchSettings, dense: Dense) -> FixedRatios:
    name = settings.allocation or "uniform"
    rule = lru_cache(maxsize=64)(lambda sparsity: ALLOCATIONS[name].ratios(dense, sparsity))
    return FixedRatios(dense.layers, rule)


def baselines(settings: SearchSettings, dense: Dense, evaluator: Evaluator) -> list[Baseline]:
    """Return the published metrics where metrics are searched, the allocations where ratios are.

    Metrics are joined with the run's own allocation, allocations with the run's metric or, where metrics
    are searched too, with Wanda. Over an interval all are measured at its ends and its middle.
    """
    found: list[Baseline] = []
    fixed = _fixed(settings, dense)
    for target in _targets(settings):
        at = f" @ {target:.4g}" if isinstance(settings.sparsity, tuple) else ""
        own = (
            settings.metric
            if settings.metric in PUBLISHED
            else ("wanda" if not settings.metric else "metric")
        )
        given = f" + {settings.allocation}" if settings.allocation else ""
        if settings.metric_space:
            for name, published in PUBLISHED.items():
                if published.expression.leaves <= evaluator.leaves:
                    ratios = fixed.ratios((), target)
                    found.append(Baseline(f"{name}{given}{at}", published.expression, ratios, target))
        if settings.ratio_space:
            for allocation in ALLOCATIONS.values():
                for label, ratios in allocation.variants(dense, target).items():
                    name = own if label == "uniform" else f"{own} + {label}"
                    is_one = label == allocation.name
                    found.append(Baseline(f"{name}{at}", dense.metric, ratios, target, is_one))
    return list({(b.metric, b.ratios): b for b in reversed(found)}.values())[::-1]


def seeds(problem: Problem, published: Sequence[Baseline]) -> list[Encoding]:
    """Return the encodings that come nearest to published rules, each once; of ramps some."""
    chosen = [b for b in published if b.is_one]
    for sparsity in dict.fromkeys(b.sparsity for b in published):
        ramps = [b for b in published if not b.is_one and b.sparsity == sparsity]
        for direction in (ramps[: len(ramps) // 2], ramps[len(ramps) // 2 :]):
            chosen += direction[1 :: max(1, len(direction) // _RAMPS_AS_SEEDS)]
    encodings = [problem.encoding(b.metric, b.ratios, b.sparsity) for b in chosen]
    return list(dict.fromkeys(encoding for encoding in encodings if encoding is not None))


class BaselinesFirst:
    """A searcher that asks for given candidates first: the baselines of a run.

    Args:
        searcher: Takes over once the opening has been asked.
        candidates: What to ask first.
        seeds_searcher: Whether the searcher learns of the opening's trials (seeding).
    """

    def __init__(self, searcher: Searcher, candidates: Sequence[Candidate], *, seeds_searcher: bool) -> None:
        self._searcher = searcher
        self._waiting = list(candidates)
        self._opening = {candidate.key for candidate in candidates}
        self._seeds_searcher = seeds_searcher

    def ask(self, count: int) -> list[Candidate]:
        """Return the whole opening at first, then what the searcher proposes."""
        asked, self._waiting = self._waiting, []
        return asked or self._searcher.ask(count)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Pass the trials on, the opening's only if it seeds the searcher."""
        self._searcher.tell(
            [t for t in trials if self._seeds_searcher or t.candidate.key not in self._opening]
        )
