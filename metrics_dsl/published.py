"""The published pruning metrics, each as one line of the metric language.

Papers measure activations in units of their own; here ``X`` is the root-mean-square over tokens and ``G``
the root-mean-square over sequences. Factors that orders do not depend on are dropped; where two terms are
added, the paper's weights are converted with its own calibration of N = 128 sequences of 2048 tokens:
sqrt(a_j) = sqrt(2048) X and sqrt(sum of g^2) = sqrt(128) G.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import SecateurError
from .expression import Expression, MetricError
from .operators import LEAVES, OPERATORS
from .order import GROUPS
from .parser import did_you_mean, parse_metric
from .plugins import fill, open_table


@dataclass(frozen=True)
class Published:
    """A published metric: its text in the language, its source and the group its paper compares in."""

    name: str
    text: str
    group: str
    source: str
    note: str = ""

    @property
    def expression(self) -> Expression:
        """The parsed text."""
        return parse_metric(self.text)


PUBLISHED: dict[str, Published] = {
    metric.name: metric
    for metric in (
        Published("magnitude", "abs(W)", "layer", "Han et al. 2015, arXiv 1506.02626"),
        Published("wanda", "abs(W) * X", "row", "Sun et al. 2024, arXiv 2306.11695"),
        Published(
            "ria-1", "(abs(W) / col_sum(abs(W)) + abs(W) / row_sum(abs(W))) * X", "layer",
            "Zhang et al. 2024, ICLR (Relative Importance and Activations)", "with a = 1",
        ),
        Published(
            "ria", "(abs(W) / col_sum(abs(W)) + abs(W) / row_sum(abs(W))) * sqrt(X)", "layer",
            "Zhang et al. 2024, ICLR (Relative Importance and Activations)", "with a = 0.5, its default",
        ),
        Published(
            "stade", "square(W) * V", "row", "arXiv 2503.22451",
            "without the bias that makes up for the mean",
        ),
        Published(
            "gblm", "abs(W) * (X + 25 * G)", "row", "Das et al. 2023, arXiv 2311.04902",
            "100 * sqrt(128) / sqrt(2048) = 25",
        ),
        Published(
            "pruner-zero", "square(W) * minmax(G)", "row", "Dong et al. 2024, arXiv 2406.02924",
            "the best tree of its release",
        ),
        Published(
            "sparsegpt", "square(W) / D", "layer", "Frantar and Alistarh 2023, arXiv 2301.00774",
            "the score alone: no weight update, no blocks of 128 columns",
        ),
        Published(
            "lognorm", "log1p(abs(W) / row_norm(W) + abs(W) / col_norm(W)) * sqrt(X)", "row",
            "Zhang et al. 2025, ICME (OptSpa)",
        ),
        Published(
            "wanda++", "abs(W) * (X + 2.21 * G)", "row", "Yang et al. 2025, arXiv 2503.04992",
            "its form with the full gradient for the regional one; 100 / sqrt(2048) = 2.21",
        ),
    )
}  # fmt: skip


_NAME = re.compile(r"[\w+-]+")


def _admitted(metric: Published, _origin: str) -> Published:
    """Return a metric of somebody else's, checked: it can be read, and its name is not a metric itself."""
    if not _NAME.fullmatch(metric.name) or metric.name in LEAVES or metric.name in OPERATORS:
        raise SecateurError(f"expected the name of a metric such as mine-2026, got {metric.name!r}")
    if metric.group not in GROUPS:
        raise SecateurError(
            f"expected the group row or layer for the metric {metric.name}, got {metric.group!r}"
        )
    try:
        parse_metric(metric.text)
    except MetricError as error:
        raise SecateurError(f"the metric {metric.name} cannot be read: {error}") from None
    return metric


open_table(PUBLISHED, Published, "a published metric", "metrics", _admitted)


def read_metric(text: str) -> Expression:
    """Return a metric from the name of a published one or from its text.

    Raises:
        MetricError: For text that is neither; a name that is nearly right is told.
    """
    if text not in PUBLISHED and _NAME.fullmatch(text):
        fill(PUBLISHED)
    if text in PUBLISHED:
        return PUBLISHED[text].expression
    try:
        return parse_metric(text)
    except MetricError as error:
        hint = did_you_mean(text, PUBLISHED) if _NAME.fullmatch(text) else ""
        if "did you mean" not in hint:
            raise
        raise MetricError(f"expected a metric or the name of a published one, got {text!r}{hint}") from error
