"""An evaluator that remembers: what the archive knows is not measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...metrics_dsl.expression import Expression
from ...search.core.candidate import Candidate, Layer, Measurement, Part, Reduction, Stage
from ...search.core.protocols import Done, Evaluator, Summaries, ignore
from .archive import Archive


class RememberingEvaluator:
    """Measures with another evaluator, only what is not in the archive, and records it at once.

    Args:
        evaluator: Measures what is new.
        archive: Open for writing.
        progress: Called with (stage, done, total) after something new has been measured.
        earlier: Archives of runs whose measurements are this run's too; all but the seed is the same.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        archive: Archive,
        progress: Callable[[Stage, int, int], None] = lambda _stage, _done, _total: None,
        earlier: Sequence[Archive] = (),
    ) -> None:
        self._evaluator = evaluator
        self._archive = archive
        self._progress = progress
        self._earlier = earlier

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers in model order."""
        return self._evaluator.layers

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that metrics may use."""
        return self._evaluator.leaves

    def measure(
        self,
        candidates: Sequence[Candidate],
        stage: Stage,
        part: Part = "selection",
        tokens: int = 0,
        done: Done = ignore,
    ) -> list[Measurement]:
        """Return a measurement of each candidate, remembered or new."""
        found = {c.key: self._recall(c, stage, part, tokens) for c in candidates}
        new = [c for c in candidates if found[c.key] is None]
        count = len(candidates) - len(new)

        def record(measured: Sequence[tuple[Candidate, Measurement]]) -> None:
            nonlocal count
            self._archive.record(measured, part, tokens)
            count += len(measured)
            self._progress(stage, count, len(candidates))
            done(measured)

        if new:
            measured = self._evaluator.measure(new, stage, part, tokens, record)
            found.update((c.key, m) for c, m in zip(new, measured, strict=True))
        return [m for c in candidates if (m := found[c.key]) is not None]

    def _recall(self, candidate: Candidate, stage: Stage, part: Part, tokens: int) -> Measurement | None:
        found = self._archive.recall(candidate.key, stage, part, tokens)
        if found is not None:
            return found
        for archive in self._earlier:
            found = archive.recall(candidate.key, stage, part, tokens)
            if found is not None:
                self._archive.record([(candidate, found)], part, tokens)
                return found
        return None

    def summarise(self, metric: Expression, reductions: Sequence[Reduction]) -> Summaries:
        """Return reductions of a metric's scores on the dense model."""
        return self._evaluator.summarise(metric, reductions)

    def close(self) -> None:
        """Close the other evaluator; the archive stays open."""
        self._evaluator.close()
