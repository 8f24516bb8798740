"""Ratio spaces: numbers that a searcher varies, and the layerwise ratios they stand for.

All but ``feature`` are linear: ratios are the sparsity plus a matrix times the numbers, projected onto the
sparsity and rounded to whole columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...metrics_dsl.expression import Expression
from ...metrics_dsl.published import PUBLISHED
from ..core.candidate import Layer, Reduction
from .allocation import Dense, dsa_importance, minmax
from .ratios import project, sizes, to_columns
from .variables import Values, Variable

_Floats = NDArray[np.float64]


class RatioSpace(Protocol):
    """Allocations that a few numbers describe."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers."""

    @property
    def variables(self) -> Sequence[Variable]:
        """The numbers."""

    def ratios(self, values: Values, sparsity: float) -> tuple[float, ...]:
        """Return each layer's ratio; the sparsity is held."""

    def encode(self, ratios: ArrayLike, sparsity: float) -> Values | None:
        """Return the values that come nearest to given ratios, None if there are none."""


@dataclass(frozen=True)
class LinearSpace:
    """Ratios that are linear in the numbers.

    Attributes:
        layers: The prunable layers.
        variables: The numbers.
        matrix: What each adds to each layer's ratio, (layers, variables).
        exchange: Whether each number stands for weights of its own, so that moving weights from one
            to another keeps the budget.
    """

    layers: Sequence[Layer]
    variables: Sequence[Variable]
    matrix: _Floats
    exchange: bool = False

    def ratios(self, values: Values, sparsity: float) -> tuple[float, ...]:
        """Return each layer's ratio, in whole columns."""
        wanted = sparsity + self.matrix @ np.asarray(values, dtype=np.float64)
        return to_columns(project(wanted, sizes(self.layers), sparsity), self.layers, sparsity)

    def encode(self, ratios: ArrayLike, sparsity: float) -> Values:
        """Return the values whose ratios are nearest in the weighted sum of squares."""
        root = np.sqrt(sizes(self.layers))
        offsets = np.asarray(ratios, dtype=np.float64) - sparsity
        found, *_ = np.linalg.lstsq(self.matrix * root[:, None], offsets * root, rcond=None)
        pairs = zip(self.variables, found, strict=True)
        return tuple(variable.clip(round(float(value), 9)) for variable, value in pairs)


@dataclass(frozen=True)
class FeatureSpace:
    """A feature of each block and a width: every closed form that spreads one, in any direction."""

    dense: Dense
    names: tuple[str, ...]
    features: _Floats  # (features, blocks), each in [0, 1]

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers."""
        return self.dense.layers

    @property
    def variables(self) -> Sequence[Variable]:
        """Which feature, and how far it spreads the ratios; the sign is the direction."""
        return (Variable("feature", choices=self.names), Variable("width", -0.25, 0.25))

    def ratios(self, values: Values, sparsity: float) -> tuple[float, ...]:
        """Return each layer's ratio, in whole columns."""
        feature, width = values
        of_blocks = sparsity - 2 * width * self.features[int(feature)]
        wanted = self.dense.of_blocks(of_blocks)
        layers = self.dense.layers
        return to_columns(project(wanted, sizes(layers), sparsity), layers, sparsity)

    def encode(self, ratios: ArrayLike, sparsity: float) -> Values | None:
        """Return the feature and width that come nearest, unless they explain less than half."""
        layers = self.dense.layers
        weighted = np.bincount(self.dense.block_ranks, sizes(layers) * (np.asarray(ratios) - sparsity))
        offsets = weighted / self.dense.block_sizes
        offsets -= offsets.mean()
        centred = self.features - self.features.mean(1, keepdims=True)
        energy = np.maximum((centred**2).sum(1), 1e-30)
        product = centred @ offsets
        explained = product**2 / energy
        best = int(np.argmax(explained))
        if explained[best] < 0.5 * (offsets**2).sum():
            return None
        return float(best), self.variables[1].clip(round(float(-product[best] / energy[best] / 2), 9))


# The table ------------------------------------------------------------------------------------------


def _depth(layers: Sequence[Layer]) -> _Floats:
    """Return each layer's depth from -1 to 1."""
    last = max(layer.block for layer in layers)
    return np.array([2 * layer.block / last - 1 if last else 0.0 for layer in layers])


def _columns(
    layers: Sequence[Layer], parts: dict[str, tuple[float, _Floats]], **options: bool
) -> LinearSpace:
    variables = tuple(Variable(name, -bound, bound) for name, (bound, _) in parts.items())
    return LinearSpace(
        layers, variables, np.column_stack([column for _, column in parts.values()]), **options
    )


def _where(found: Sequence[bool]) -> _Floats:
    return np.array(found, dtype=np.float64)


def _curve(dense: Dense) -> LinearSpace:
    layers, depth = dense.layers, _depth(dense.layers)
    last = dense.blocks - 1
    parts = {
        "slope": (0.3, depth),
        "curvature": (0.3, depth**2 - 1 / 3),
        "first block": (0.4, _where([place == 0 for place in dense.block_ranks])),
        "last block": (0.4, _where([place == last for place in dense.block_ranks])),
    }
    for kind in dict.fromkeys(layer.kind for layer in layers):
        parts[kind] = (0.3, _where([x.kind == kind for x in layers]))
    return _columns(layers, parts)


def _block(dense: Dense) -> LinearSpace:
    layers = dense.layers
    own = sorted({layer.block for layer in layers})
    parts = {f"block {b}": (0.35, _where([x.block == b for x in layers])) for b in own}
    return _columns(layers, parts, exchange=True)


def _layer(dense: Dense) -> LinearSpace:
    layers = dense.layers
    parts = {x.name: (0.4, column) for x, column in zip(layers, np.eye(len(layers)), strict=True)}
    return _columns(layers, parts, exchange=True)


def _ramp(dense: Dense) -> LinearSpace:
    return _columns(dense.layers, {"slope": (0.4, _depth(dense.layers))})


def _width(reduction: Reduction) -> Callable[[Dense], LinearSpace]:
    """Return the space of one closed form's width, half of what the blocks differ by at most."""

    def build(dense: Dense) -> LinearSpace:
        column = np.array(dense.of_blocks(1 - 2 * _published_feature(dense, reduction)))
        return _columns(dense.layers, {"width": (0.25, column)})

    return build


def _published_feature(dense: Dense, reduction: Reduction) -> _Floats:
    """Return what a closed form spreads over blocks, from 0 to 1, (blocks,)."""
    if reduction == "tail":
        return minmax(dense.summarise(Expression("W"), ["tail"])["tail"])
    values = dense.wanda(reduction)
    return minmax(dsa_importance(values) if reduction == "log_variance" else values)


_REDUCTIONS: tuple[Reduction, ...] = (
    "mean", "variance", "log_variance", "maximum", "norm", "outliers_3", "outliers_5", "outliers_7",
    "outliers_10",
)  # fmt: skip


def _feature(dense: Dense) -> FeatureSpace:
    """Return the space of published metrics' scores, reduced in every way, with depth and spectra."""
    found = {"depth": np.arange(dense.blocks, dtype=np.float64)}
    found["tail(W)"] = _published_feature(dense, "tail")
    found["dsa"] = _published_feature(dense, "log_variance")
    expressions = {str(PUBLISHED[name].expression) for name in ("magnitude", "wanda", "ria-1", "stade")}
    expressions.add(str(dense.metric))
    for text in sorted(expressions):
        metric = dense.metric if text == str(dense.metric) else _published(text)
        for reduction, values in dense.summarise(metric, _REDUCTIONS).items():
            found[f"{reduction}({text})"] = values
    finite = {name: minmax(values) for name, values in found.items() if np.isfinite(values).all()}
    return FeatureSpace(dense, tuple(finite), np.array(list(finite.values())))


def _published(text: str) -> Expression:
    return next(p.expression for p in PUBLISHED.values() if str(p.expression) == text)


RATIO_SPACES: dict[str, Callable[[Dense], RatioSpace]] = {
    "curve": _curve,
    "block": _block,
    "layer": _layer,
    "feature": _feature,
    "ramp": _ramp,
    "owl": _width("outliers_5"),
    "dlp": _width("mean"),
    "dsa": _width("log_variance"),
    "alpha": _width("tail"),
}
