"""The local evaluator: one worker with the whole model, in this process, on the CPU or one GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Unpack

from torch import Tensor

from ...metrics_dsl.expression import Expression
from ...search.core.candidate import Candidate, Layer, Measurement, Part, Reduction, Stage
from ...search.core.protocols import Done, Summaries, ignore
from ..calibrate.folder import Calibration
from ..model.load import accelerator
from .messages import (
    Window,
    check_candidates,
    layer_measurement,
    sensitivity_measurement,
    window_of_candidate,
)
from .worker import Worker, WorkerOptions

# Candidates that are reported together: a killed search loses no more than these. On the screen they share
# work, which is worth more than a report each.
_TOGETHER: dict[Stage, int] = {"screen": 8, "layer": 1, "model": 1, "sensitivity": 1}


class LocalEvaluator:
    """Measures candidates on one worker that holds the whole model.

    Args:
        calibration: Statistics and tokens of the model.
        options: What else a ``Worker`` is made with.

    Raises:
        ModelError: When the model cannot be loaded.
        CalibrationError: When the calibration belongs to another model.
    """

    def __init__(self, calibration: Calibration, **options: Unpack[WorkerOptions]) -> None:
        self.worker = Worker(calibration, **options)

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers in model order."""
        return self.worker.layers

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that the calibration holds."""
        return self.worker.calibration.leaves

    @property
    def accelerator(self) -> str:
        """The GPU it runs on, empty for the CPU."""
        return accelerator() if self.worker.decoder.device.type == "cuda" else ""

    @property
    def reused(self) -> tuple[int, int]:
        """Blocks whose hidden states were known, of how many that candidates went through."""
        return self.worker.reused

    def measure(
        self,
        candidates: Sequence[Candidate],
        stage: Stage,
        part: Part = "selection",
        tokens: int = 0,
        done: Done = ignore,
    ) -> list[Measurement]:
        """Return a measurement of each candidate, in order.

        The model stage runs on ``tokens`` tokens of a part, rounded to whole pieces of its sequences; 0
        is all of them. Sensitivities are those on as many tokens, another window for each candidate.
        """
        check_candidates(candidates, self.layers)
        found: list[Measurement] = []
        size = _TOGETHER[stage]
        for start in range(0, len(candidates), size):
            chunk = candidates[start : start + size]
            if stage == "sensitivity":
                measured = [self._sensitivities(candidate, part, tokens) for candidate in chunk]
            elif stage == "model":
                measured = [self.worker.model(candidate, Window(part, tokens)) for candidate in chunk]
            else:
                measured = self._layers(chunk, stage)
            done(list(zip(chunk, measured, strict=True)))
            found += measured
        return found

    def summarise(self, metric: Expression, reductions: Sequence[Reduction]) -> Summaries:
        """Return reductions of a metric's scores on the dense model.

        Raises:
            ScoreError: When scores are not finite.
        """
        return self.worker.summarise(metric, reductions)

    def masks(self, candidate: Candidate) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer's name and which of its weights a candidate keeps, (rows, columns) bool.

        Raises:
            ScoreError: When scores are not finite.
        """
        shard = self.worker.shard
        for held in sorted(shard.held, key=lambda h: h.index):
            yield held.layer.name, ~held.mask(candidate, shard.pattern)

    def close(self) -> None:
        """Free the threads and the model."""
        self.worker.close()

    def _layers(self, candidates: Sequence[Candidate], stage: Stage) -> list[Measurement]:
        start = time.perf_counter()
        found = self.worker.errors(candidates, stage)
        seconds = (time.perf_counter() - start) / len(candidates)
        return [layer_measurement(results, self.layers, stage, seconds) for results in found]

    def _sensitivities(self, candidate: Candidate, part: Part, tokens: int) -> Measurement:
        window = window_of_candidate(candidate, part, tokens, self.worker.calibration.shape(part))
        found = self.worker.backward(candidate, window)
        return sensitivity_measurement(found, self.worker.ids(window).numel())
