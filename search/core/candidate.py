"""What is searched for and what is found out: layers, candidates, measurements and trials."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression, check_metric
from ...metrics_dsl.order import GROUPS, order_form
from .reading import Given

# The first three decide; "sensitivity" says how a measured candidate would change with its ratios.
Stage = Literal["screen", "layer", "model", "sensitivity"]
Part = Literal["statistics", "selection", "holdout"]
Status = Literal["measured", "rejected", "alias", "failed"]
# How scores of a metric are summed up: one number a block, or for "quantiles" a row a layer.
Reduction = Literal[
    "mean", "variance", "log_variance", "maximum", "norm",
    "outliers_3", "outliers_5", "outliers_7", "outliers_10", "tail", "quantiles",
]  # fmt: skip
# What a file may say of a layer: far beyond any model, and still such that nothing overflows.
MOST_BLOCKS = 1 << 20
_WIDEST = 1 << 26  # rows or columns
STAGES: tuple[Stage, ...] = ("screen", "layer", "model")


@dataclass(frozen=True)
class Layer:
    """A prunable linear layer: its full module name, decoder block, kind and shape (rows, columns)."""

    name: str
    block: int
    kind: str
    rows: int
    columns: int

    @classmethod
    def read(cls, given: Given) -> Layer:
        """Return the layer that a file describes, with whatever else it says of it.

        Raises:
            SecateurError: When something is missing or of another type.
        """
        return cls(
            given.field("name").text(),
            given.field("block").count(0, MOST_BLOCKS),
            given.field("kind").text(),
            given.field("rows").count(1, _WIDEST),
            given.field("columns").count(1, _WIDEST),
        )

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Candidate:
    """One complete pruning rule.

    Args:
        metric: Gives every weight a score; larger means keep.
        ratios: Fraction of weights to remove, in [0, 1), one for each layer in model order.
        group: The weights that compete with each other.

    Raises:
        MetricError: When the metric does not give each weight a score of its own.
        SecateurError: For a ratio outside [0, 1) or an unknown group.
    """

    metric: Expression
    ratios: tuple[float, ...]
    group: str = "row"

    def __post_init__(self) -> None:
        check_metric(self.metric)
        for ratio in self.ratios:
            if not (math.isfinite(ratio) and 0 <= ratio < 1):
                raise SecateurError(f"expected ratios in [0, 1), got {ratio}")
        if self.group not in GROUPS:
            raise SecateurError(f"expected a group among {', '.join(GROUPS)}, got {self.group!r}")

    @cached_property
    def key(self) -> str:
        """Stable identifier: a hash of the candidate's text, the same in every process."""
        shared = self.shared_ratio  # most have one, and writing a number takes long
        ratios = map(repr, self.ratios) if shared is None else [repr(shared)] * len(self.ratios)
        text = "\n".join((str(self.metric), self.group, ",".join(ratios)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def shared_ratio(self) -> float | None:
        """The ratio that all layers have; None where they differ. Such a rule goes to any model."""
        return self.ratios[0] if len(set(self.ratios)) == 1 else None

    @cached_property
    def order_key(self) -> tuple[str, str, tuple[float, ...]]:
        """What decides the masks: candidates that share it prune the same weights."""
        return str(order_form(self.metric, self.group)), self.group, self.ratios


@dataclass(frozen=True)
class Measurement:
    """What one stage found out about one candidate, or why it failed.

    Attributes:
        stage: How thoroughly the candidate was measured.
        layer_errors: Relative squared output error of each layer, in model order; may be empty.
        values: Finite numbers by name: ``sparsity``, ``layer_error``, ``kl`` and so on.
        seconds: Wall-clock time that measuring took.
        tokens: Tokens that were run through the pruned model, forwards; backwards counts twice.
        parts: KL of each sequence that the model stage ran on, nats per token; may be empty.
        failure: A sentence that says why there are no values; empty for a success.
        fingerprint: Hash of the masks on the sampled rows, made by the screen stage.
        sensitivities: Change of KL with each layer's ratio, nats per token, in model order; may be empty.
        worker: Where it was measured, as host and process; empty for the process that searches.
        attempts: How often measuring was begun: workers may die.
    """

    stage: Stage
    layer_errors: tuple[float, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""
    fingerprint: str = ""
    tokens: int = 0
    parts: tuple[float, ...] = ()
    sensitivities: tuple[float, ...] = ()
    worker: str = ""
    attempts: int = 1


@dataclass(frozen=True)
class Failure:
    """Why there is no result where one was wanted, on the way to the measurement that says so.

    Attributes:
        reason: A sentence.
        seconds: Wall-clock time that was spent until then.
    """

    reason: str
    seconds: float = 0.0

    def of(self, stage: Stage, before: float = 0.0) -> Measurement:
        """Return the measurement that says so, with the seconds that were spent before."""
        return Measurement(stage, seconds=before + self.seconds, failure=self.reason)


@dataclass(frozen=True)
class Trial:
    """A candidate with what is known about it.

    ``alias_of`` is the key of the candidate whose masks, and so whose measurement, it shares. Its status is
    ``alias`` if that one was measured, else that one's.
    """

    candidate: Candidate
    measurement: Measurement
    status: Status
    alias_of: str = ""


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (N, M) of a pattern ``N:M``, N removed of M consecutive inputs; None if unstructured.

    Raises:
        SecateurError: For anything else.
    """
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise SecateurError(
            f"expected the pattern unstructured or N:M with 0 < N < M such as 2:4, got {pattern!r}"
        )
    return int(found[1]), int(found[2])


def group_size(rows: int, columns: int, group: str) -> int:
    """Return how many weights of a layer (rows, columns) compete: those of a row, or all of them."""
    return columns if group == "row" else rows * columns


def removed_of(size: int, ratio: float) -> int:
    """Return how many of the ``size`` weights that compete go: floor(size * ratio), in 64-bit floats."""
    return int(size * ratio)


def count_removed(layer: Layer, ratio: float, group: str, pattern: str = "unstructured") -> int:
    """Return how many weights of a layer go; a pattern ``N:M`` decides without the ratio."""
    if counts := parse_pattern(pattern):
        return layer.rows * (layer.columns // counts[1]) * counts[0]
    size = group_size(layer.rows, layer.columns, group)
    return layer.size // size * removed_of(size, ratio)


def uniform(metric: Expression, layers: Sequence[Layer], sparsity: float, group: str = "row") -> Candidate:
    """Return the candidate that removes the same fraction of weights from every layer."""
    return Candidate(metric, (float(sparsity),) * len(layers), group)
