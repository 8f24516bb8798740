"""The problem: what a run searches, and how an encoding becomes a complete candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ...metrics_dsl.expression import Expression
from ..core import defaults
from ..core.candidate import Candidate, Layer
from ..core.objectives import Objective
from .metric_space import MetricSpace
from .optishear import MetaSpace
from .ratio_space import RatioSpace
from .variables import Encoding, Values, Variable
from .varied import Varied, together


@dataclass(frozen=True)
class FixedRatios:
    """Ratios that are not searched but follow from the sparsity.

    Attributes:
        layers: The prunable layers.
        rule: Gives each layer's ratio; uniform if left out.
    """

    layers: Sequence[Layer]
    rule: Callable[[float], tuple[float, ...]] | None = None
    variables: Sequence[Variable] = ()

    def ratios(self, _values: Values, sparsity: float) -> tuple[float, ...]:
        """Return the ratios, rounded down to whole columns when masks are made, as published."""
        return self.rule(sparsity) if self.rule else (float(sparsity),) * len(self.layers)

    def encode(self, ratios: ArrayLike, sparsity: float) -> Values | None:
        """Return no values for the fixed ratios, None for others."""
        return () if tuple(np.asarray(ratios).tolist()) == self.ratios((), sparsity) else None


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        metrics: Trees, the meta family, or one given metric.
        ratios: A ratio space, or ratios that are not searched.
        objectives: What to minimise.
        sparsity: The sparsity to hold, or an interval of which every candidate has its own.
        group: The weights that compete.
        seeds: Encodings worth asking first, such as those of published rules.
        starts: Encodings that the user wants asked first, of trees; also where there are no seeds.
        phase: Batches during which metrics and then ratios are varied alone; 0 varies both at once.
    """

    metrics: MetricSpace | MetaSpace | Expression
    ratios: RatioSpace
    objectives: Sequence[Objective]
    sparsity: float | tuple[float, float] = defaults.SPARSITY
    group: str = "row"
    seeds: Sequence[Encoding] = field(default=(), repr=False)
    starts: Sequence[Encoding] = field(default=(), repr=False, kw_only=True)
    phase: int = 0

    @property
    def trees(self) -> MetricSpace | None:
        """The space of trees, if they are searched."""
        return self.metrics if isinstance(self.metrics, MetricSpace) else None

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers."""
        return self.ratios.layers

    @property
    def metric_variables(self) -> Sequence[Variable]:
        """The choices that make a metric of the meta family."""
        return self.metrics.variables if isinstance(self.metrics, MetaSpace) else ()

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        """All numbers and choices: of the metric, of the ratios, and the sparsity if it is free."""
        own = () if isinstance(self.sparsity, float) else (Variable("sparsity", *self.sparsity),)
        return (*self.metric_variables, *self.ratios.variables, *own)

    @cached_property
    def varied(self) -> frozenset[Varied]:
        """What a searcher has to vary; nothing where one rule is given."""
        parts: list[Varied] = ["trees"] if self.trees else []
        parts += ["choices" if variable.choices else "one number" for variable in self.variables]
        return together(parts)

    def candidate(self, encoding: Encoding) -> Candidate:
        """Return the complete rule that an encoding stands for."""
        of_metric = len(self.metric_variables)
        of_ratios = of_metric + len(self.ratios.variables)
        sparsity = self.sparsity if isinstance(self.sparsity, float) else encoding.values[of_ratios]
        if isinstance(self.metrics, MetaSpace):
            metric = self.metrics.metric(encoding.values[:of_metric])
        elif isinstance(self.metrics, MetricSpace):
            assert encoding.tree is not None
            metric = encoding.tree
        else:
            metric = self.metrics
        ratios = self.ratios.ratios(encoding.values[of_metric:of_ratios], sparsity)
        return Candidate(metric, ratios, self.group)

    def encoding(self, metric: Expression, ratios: Sequence[float], sparsity: float) -> Encoding | None:
        """Return the encoding that comes nearest to a rule, None if none comes near.

        What is searched of a metric is represented exactly or not at all; ratios approximately.
        """
        tree = None
        of_metric: Values | None = ()
        if isinstance(self.metrics, MetricSpace):
            tree = self.metrics.simplest(metric)
            of_metric = None if tree is None else ()
        elif isinstance(self.metrics, MetaSpace):
            of_metric = self.metrics.values(metric)
        of_ratios = self.ratios.encode(ratios, sparsity)
        if of_metric is None or of_ratios is None:
            return None
        own = () if isinstance(self.sparsity, float) else (float(sparsity),)
        return Encoding(tree, (*of_metric, *of_ratios, *own))

    @property
    def is_exact(self) -> bool:
        """Whether a rule's encoding, where there is one, stands for just that rule."""
        return not self.ratios.variables and isinstance(self.sparsity, float)
