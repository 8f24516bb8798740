"""A worker: some blocks of a model in one process, with what it takes to measure candidates on them.

A local search has one worker with all blocks. On a cluster the blocks may be split over several, and
the hidden states that one leaves are what the next is entered with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression, MetricError
from ...search.core import defaults
from ...search.core.candidate import Candidate, Failure, Layer, Measurement, Reduction, Stage, parse_pattern
from ..calibrate.folder import Calibration, CalibrationError
from ..model.block_calls import Batch
from ..model.checksums import Checksums
from ..model.decoder import Decoder, weight_of
from ..model.load import choose_device, choose_dtype
from ..model.load_blocks import load_blocks
from .dense_reference import DenseReference, batches_of
from .messages import BackwardState, ForwardState, LayerResults, Window
from .prefix_cache import Prefix, Prefixes
from .sensitivity import slopes_of_blocks
from .shard import SCREEN_ROWS, ScoreError, Shard
from .windows import some_tokens, window_of


class WorkerError(SecateurError):
    """Workers that cannot be had, or cannot work; the message says what to do."""


@dataclass(frozen=True)
class Device:
    """Where and how a model runs: device name, floating type, CPU threads (0: all cores)."""

    name: str = "auto"
    dtype: str = "float32"
    threads: int = defaults.THREADS


class WorkerOptions(TypedDict, total=False):
    """What a worker may be told besides the calibration.

    Attributes:
        pattern: ``unstructured`` or ``N:M``.
        device: Where to run.
        model: Where to load the model from, if not from where it was calibrated.
        rows: Rows per layer that the screen stage looks at.
        reuse: Whether hidden states are kept for candidates that agree on the first blocks.
        trust_remote_code: Whether code that comes with the model may run; that is said in each call anew.
        blocks: The blocks it holds, next to each other; all if left out.
    """

    pattern: str
    device: Device
    model: str | None
    rows: int
    reuse: bool
    blocks: range | None
    trust_remote_code: bool


class Worker:
    """Measures on the blocks that it holds; the dense weights are never copied.

    Args:
        calibration: Statistics and tokens of the model.
        options: As in ``WorkerOptions``.

    Raises:
        ModelError: When the model cannot be loaded.
        CalibrationError: When the calibration belongs to another model, or needs code that is not allowed.
    """

    def __init__(self, calibration: Calibration, **options: Unpack[WorkerOptions]) -> None:
        device = options.get("device", Device())
        code = options.get("trust_remote_code", False)
        check_code(calibration, trust_remote_code=code)
        pattern = options.get("pattern", "unstructured")
        counts = parse_pattern(pattern)
        if device.threads:
            torch.set_num_threads(device.threads)
        self.decoder = load_blocks(
            options.get("model") or calibration.checked_model(),
            options.get("blocks"),
            choose_dtype(device.dtype),
            choose_device(device.name),
            trust_remote_code=code,
        )
        _leave_dense(self.decoder, calibration)
        _check_same_model(self.decoder, calibration)
        for layer in self.decoder.layers:
            if counts and layer.columns % counts[1]:
                raise SecateurError(
                    f"expected layers whose inputs divide by {counts[1]} for the pattern {pattern}, got "
                    f"{layer.columns} inputs in {layer.name}; choose another pattern"
                )
        self.blocks = options.get("blocks") or range(len(self.decoder.blocks))
        self.calibration = calibration
        self.shard = Shard(
            self.decoder,
            calibration,
            pattern=pattern,
            rows=options.get("rows", SCREEN_ROWS),
            threads=device.threads or None,
            blocks=self.blocks,
        )
        self.prefixes = Prefixes(self.layers) if options.get("reuse", True) else None
        self._batches: dict[Window, list[Batch]] = {}
        self._references: dict[Window, DenseReference] = {}
        self._summaries: dict[tuple[Expression, Reduction], NDArray[np.float64]] = {}

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers of the whole model in model order."""
        return self.decoder.layers

    @property
    def reused(self) -> tuple[int, int]:
        """Blocks whose hidden states were known, of how many that candidates went through."""
        return (self.prefixes.reused, self.prefixes.blocks) if self.prefixes else (0, 0)

    def errors(self, candidates: Sequence[Candidate], stage: Stage) -> list[LayerResults]:
        """Return for each candidate a result of each layer held."""
        return self.shard.errors(candidates, all_rows=stage == "layer")

    def summarise(
        self, metric: Expression, reductions: Sequence[Reduction]
    ) -> dict[Reduction, NDArray[np.float64]]:
        """Return reductions of a metric's scores on the dense blocks held.

        Raises:
            ScoreError: When scores are not finite.
        """
        missing = [name for name in reductions if (metric, name) not in self._summaries]
        if missing:
            found = self.shard.summarise(metric, missing)
            self._summaries.update(((metric, name), values) for name, values in found.items())
        return {name: self._summaries[metric, name] for name in reductions}

    @torch.no_grad()
    def forward(
        self, candidate: Candidate | None, window: Window, entering: ForwardState | Failure | None
    ) -> ForwardState | Failure:
        """Run tokens through the blocks held.

        Args:
            candidate: How they are pruned; None leaves them dense.
            window: The tokens.
            entering: What left the blocks before; None before the first.
        """
        if isinstance(entering, Failure):
            return entering
        batches = self._batches_of(window)
        start = time.perf_counter()
        hidden = self._entering(batches, entering)
        removed = entering.removed if entering else 0
        first = self.blocks.start
        prefixes = self.prefixes if candidate and window.number is None else None
        if prefixes and candidate:
            known = prefixes.longest(candidate, window, self.blocks)
            first, hidden, removed = known or Prefix(first, hidden, removed)
        try:
            for block in range(first, self.blocks.stop):
                weights, count = self.shard.masked_weights(candidate, block) if candidate else ({}, 0)
                removed += count
                with self.decoder.with_weights(weights):
                    hidden = [
                        self.decoder.run_block(block, batch, states)
                        for batch, states in zip(batches, hidden, strict=True)
                    ]
                if prefixes and candidate:
                    prefixes.keep(candidate, window, Prefix(block + 1, hidden, removed))
        except (ScoreError, MetricError) as error:
            return Failure(str(error), time.perf_counter() - start)
        return ForwardState(hidden, removed, time.perf_counter() - start)

    def model(
        self,
        candidate: Candidate,
        window: Window,
        entering: ForwardState | Failure | None = None,
        dense: ForwardState | None = None,
    ) -> Measurement:
        """Run tokens through the last blocks and compare what comes out with the dense model.

        Args:
            candidate: How they are pruned.
            window: The tokens.
            entering: What left the blocks before; None if all are held.
            dense: The same of the dense model, for when these tokens are new here.
        """
        if isinstance(entering, Failure):
            return entering.of("model")
        before = entering.seconds if entering else 0.0
        reference = self._reference(window, dense)
        passed = self.forward(candidate, window, entering)
        if isinstance(passed, Failure):
            return passed.of("model", before)
        start = time.perf_counter()
        values, parts = reference.compare(self.decoder, passed.hidden)
        seconds = before + passed.seconds + time.perf_counter() - start
        if not all(map(math.isfinite, values.values())):
            return Failure("the pruned model's output is not finite", seconds).of("model")
        values["sparsity"] = passed.removed / sum(layer.size for layer in self.layers)
        return Measurement("model", (), values, seconds, tokens=reference.tokens, parts=parts)

    def backward(
        self,
        candidate: Candidate,
        window: Window,
        entering: ForwardState | Failure | None = None,
        leaving: BackwardState | Failure | None = None,
        dense: ForwardState | None = None,
    ) -> BackwardState | Failure:
        """Return sensitivities of the layers held, on the way back through their blocks.

        Args:
            candidate: How the model is pruned.
            window: The tokens.
            entering: What left the blocks before; None before the first.
            leaving: What came back through the blocks behind; None behind the last.
            dense: What left the blocks before in the dense model; for the last blocks of several workers.
        """
        if self.shard.pattern != "unstructured":
            raise SecateurError(
                f"expected ratios that can change for sensitivities, got {self.shard.pattern}"
            )
        if isinstance(entering, Failure):
            return entering
        if isinstance(leaving, Failure):
            return leaving
        batches = self._batches_of(window)
        reference = self._reference(window, dense) if leaving is None else None
        start = time.perf_counter()

        def gradients(hidden: list[Tensor]) -> list[Tensor]:
            if reference is not None:
                return reference.gradients(self.decoder, hidden)
            assert leaving is not None
            return [g.to(h) for g, h in zip(leaving.gradients, hidden, strict=True)]

        before = sum(other.seconds for other in (entering, leaving) if other is not None)
        try:
            found, after = slopes_of_blocks(
                self.decoder, self.shard, candidate, self.blocks, batches, self._entering(batches, entering),
                gradients,
            )  # fmt: skip
        except (ScoreError, MetricError) as error:
            return Failure(str(error), before + time.perf_counter() - start)
        return BackwardState(found, after, before + time.perf_counter() - start)

    def knows(self, window: Window) -> bool:
        """Whether it has what the dense model does with some tokens."""
        return window in self._references

    def forget(self) -> None:
        """Free the memory of what can be computed again."""
        self._batches.clear()
        self._references.clear()
        if self.prefixes:
            self.prefixes.clear()
        self.shard.forget()
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the threads and what is kept."""
        self.shard.close()
        self.forget()

    def ids(self, window: Window) -> Tensor:
        """Return the token ids of a window, (sequences, tokens)."""
        vocabulary = weight_of(self.decoder.model.get_input_embeddings()).shape[0]  # type: ignore[operator]
        ids = self.calibration.tokens(window.part, vocabulary)
        if window.number is None:
            return some_tokens(ids, window.tokens)
        return window_of(ids, window.tokens, window.number)

    def _entering(self, batches: Sequence[Batch], entering: ForwardState | None) -> list[Tensor]:
        if entering is None:
            return [batch.hidden for batch in batches]
        return [h.to(batch.hidden) for h, batch in zip(entering.hidden, batches, strict=True)]

    def _batches_of(self, window: Window) -> list[Batch]:
        if window not in self._batches:
            self._forget(window)
            self._batches[window] = batches_of(self.decoder, self.ids(window))
        return self._batches[window]

    def _reference(self, window: Window, dense: ForwardState | None) -> DenseReference:
        if window not in self._references:
            batches = self._batches_of(window)
            left = self.forward(None, window, dense)
            assert isinstance(left, ForwardState)  # the dense model has no scores that could fail
            # The probabilities of numbered windows are not kept: each is seldom met again.
            room = {} if window.number is None else {"kept_bytes": 0}
            self._references[window] = DenseReference(self.decoder, batches, left.hidden, **room)
        return self._references[window]

    def _forget(self, window: Window) -> None:
        """Make room for a window: one part's log-probabilities at a time, but those of all its rungs.

        Numbered windows are many: one at a time.
        """

        def stays(other: Window) -> bool:
            is_numbered = other.number is not None
            if window.number is not None:
                return not is_numbered
            return is_numbered or other.part == window.part

        self._batches = {w: b for w, b in self._batches.items() if stays(w)}
        self._references = {w: r for w, r in self._references.items() if stays(w)}


def _leave_dense(decoder: Decoder, calibration: Calibration) -> None:
    """Have the layers be those of the calibration: only running the model tells which there are."""
    known = {one.name: one.why for one in calibration.coverage.stays_dense} if calibration.coverage else {}
    chosen = {layer.name for layer in calibration.layers}
    names = [layer.name for layer in decoder.layers if layer.name not in chosen]
    decoder.leave_dense({name: known[f"{name}.weight"] for name in names if f"{name}.weight" in known})


def check_code(calibration: Calibration, *, trust_remote_code: bool) -> None:
    """Check that code may run if a calibration's model needs it: a manifest can say so, and allow nothing.

    Raises:
        CalibrationError: When it may not.
    """
    if calibration.manifest["model"].get("trust_remote_code") and not trust_remote_code:
        raise CalibrationError(
            f"expected a model that transformers knows, got that of {calibration.folder}, which was "
            "calibrated with code of its own; give --trust-remote-code to run it"
        )


def _check_same_model(decoder: Decoder, calibration: Calibration) -> None:
    expected = [(layer.name, layer.rows, layer.columns) for layer in calibration.layers]
    got = [(layer.name, layer.rows, layer.columns) for layer in decoder.layers]
    wrong = "layers" if expected != got else _other_weights(decoder, calibration)
    if wrong:
        raise CalibrationError(
            f"expected the model that {calibration.folder} was calibrated on, got one with other "
            f"{wrong}; calibrate this model, or name the right one with --model"
        )


def _other_weights(decoder: Decoder, calibration: Calibration) -> str:
    """Return what of a model with the same layers is not as it was calibrated, empty for nothing."""
    pairs = zip(calibration.entries, decoder.fingerprints(), strict=True)
    other = [i for i, (entry, found) in enumerate(pairs) if found and entry.weights != found]
    if other:
        return f"weights in {decoder.layers[other[0]].name}"
    known = calibration.checksums
    return known.other_in(Checksums.of(decoder, known)) if known else ""
