"""A record: one candidate of a run with all that an export says about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.plugins import notes, origin_of
from ...search.core.candidate import Candidate, Layer, count_removed, parse_pattern
from ...search.core.objectives import OBJECTIVES
from ...search.core.reading import Given
from ..archive.keys import whole_key
from ..archive.run_folder import RunFolder

if TYPE_CHECKING:
    from ..archive.archive import Archive

# Columns of a frame that are figures of a candidate: what was measured, in the units of frame.COLUMNS.
FIGURES = (
    "sparsity", "kl", "kl_holdout", "kl_holdout_error", "kl_rung", "layer_error", "model_error", "perplexity",
    "seconds", "tokens",
)  # fmt: skip


class ExportError(SecateurError):
    """What cannot be exported or imported; the message says why and what to do instead."""


@dataclass(frozen=True)
class CandidateRecord:
    """A candidate, the layers it prunes and what is known about it.

    Args:
        candidate: The rule.
        layers: The prunable layers in model order, one a ratio.
        pattern: ``unstructured`` or ``N:M``.
        figures: What was measured, by the names of ``FIGURES``.
        provenance: Run, settings, calibration hash and versions that it comes from; what JSON can hold.

    Raises:
        ExportError: When there is not one layer a ratio.
    """

    candidate: Candidate
    layers: tuple[Layer, ...]
    pattern: str = "unstructured"
    figures: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        if len(self.layers) != len(self.candidate.ratios):
            raise ExportError(
                f"expected one ratio a layer, got {len(self.candidate.ratios)} ratios for "
                f"{len(self.layers)} layers"
            )

    @property
    def removed(self) -> tuple[int, ...]:
        """How many weights of each layer are removed: whole weights per row, a layer or M inputs."""
        return tuple(
            count_removed(layer, ratio, self.candidate.group, self.pattern)
            for layer, ratio in zip(self.layers, self.candidate.ratios, strict=True)
        )

    @property
    def needed_plugins(self) -> list[dict[str, str]]:
        """The plugins and packages that add operators or leaves of the metric: name, and hash or version."""
        return notes(self.candidate.metric.operators | self.candidate.metric.leaves)

    @property
    def sparsity(self) -> float:
        """Fraction of all weights removed, of ``removed``."""
        return sum(self.removed) / sum(layer.size for layer in self.layers)


def layers_of(archive: Archive) -> tuple[Layer, ...]:
    """Return the layers that a run's ratios belong to, in model order.

    Raises:
        ExportError: For a run that was made before layers were noted, or one where other things stand there.
    """
    rows = archive.fact("layers")
    if rows is None:
        raise ExportError(
            f"{archive.folder} does not hold the names of its layers, which older runs lack; "
            f"`secateur resume {archive.folder}` adds them without measuring anything twice"
        )
    given = Given(rows, f"the layers of {archive.folder}", ExportError)
    return tuple(map(Layer.read, given.entries()))


def find(archive: Archive, key: str) -> CandidateRecord:
    """Return a candidate of a run by its key, the beginning of it, its published name, or ``best``.

    The best has the least value of the run's first objective.

    Raises:
        ArchiveError: When no candidate or more than one is meant.
    """
    key = whole_key(archive, key)
    row = archive.frame(f"key == {key!r}").iloc[0]
    names = dict.fromkeys((*FIGURES, *(n for n in archive.objectives if origin_of(OBJECTIVES, n))))
    figures = {name: float(row[name]) for name in names if math.isfinite(row[name])}
    provenance = {
        # A name on disk may have bytes that are no text.
        "run": archive.folder.absolute().name.encode("utf-8", "backslashreplace").decode(),
        "key": key,
        "status": row["status"],
        "published_as": row["baseline"] if isinstance(row["baseline"], str) else None,
        "settings": RunFolder(archive.folder).settings(),
        "calibration": archive.fact("calibration"),
        "versions": archive.fact("versions", {}),
    }
    candidate = archive.candidate(key)
    pattern = archive.fact("pattern", "unstructured")
    return CandidateRecord(candidate, layers_of(archive), pattern, figures, provenance)
