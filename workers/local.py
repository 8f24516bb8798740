"""The local evaluator: one model, one process, on the CPU or one GPU."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..metrics_dsl.expression import Expression, MetricError
from ..search.candidate import Candidate, Layer, Measurement, Part, Reduction, Stage, parse_pattern
from .decoder import Decoder
from .model import choose_device, choose_dtype, load_model
from .prefix import Prefix, Prefixes
from .reference import Reference, count_windows, some_tokens, window_of
from .sensitivity import FORWARD_PASSES, sensitivities
from .shard import SCREEN_ROWS, LayerResult, ScoreError, Shard
from .statistics import Calibration, CalibrationError


@dataclass(frozen=True)
class Device:
    """Where and how a model runs: device name, floating type, CPU threads (0: all cores)."""

    name: str = "auto"
    dtype: str = "float32"
    threads: int = 0


class LocalEvaluator:
    """Measures candidates on one model held in memory; the dense weights are never copied.

    Args:
        calibration: Statistics and tokens of the model.
        pattern: ``unstructured`` or ``N:M``.
        device: Where to run.
        model: Where to load the model from, if not from where it was calibrated.
        rows: Rows a layer that the screen stage looks at.
        reuse: Whether hidden states are kept for candidates that agree on the first blocks.

    Raises:
        ModelError: When the model cannot be loaded.
        CalibrationError: When the calibration belongs to another model.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        pattern: str = "unstructured",
        device: Device | None = None,
        model: str | None = None,
        rows: int = SCREEN_ROWS,
        reuse: bool = True,
    ) -> None:
        device = device or Device()
        counts = parse_pattern(pattern)
        if device.threads:
            torch.set_num_threads(device.threads)
        loaded, _ = load_model(
            model or calibration.model_source,
            dtype=choose_dtype(device.dtype),
            device=choose_device(device.name),
            trust_remote_code=bool(calibration.manifest["model"].get("trust_remote_code")),
        )
        self._decoder = Decoder(loaded)
        _check_same_model(self._decoder, calibration)
        for layer in self._decoder.layers:
            if counts and layer.columns % counts[1]:
                raise ValueError(
                    f"expected layers whose inputs divide by {counts[1]} for the pattern {pattern}, got "
                    f"{layer.columns} inputs in {layer.name}; choose another pattern"
                )
        self._calibration = calibration
        self._pattern = pattern
        self._shard = Shard(
            self._decoder, calibration, pattern=pattern, rows=rows, threads=device.threads or None
        )
        self._references: dict[tuple[Part, int], Reference] = {}
        self._windows: dict[tuple[Part, int, int], Reference] = {}
        self._summaries: dict[tuple[Expression, Reduction], NDArray[np.float64]] = {}
        self.prefixes = Prefixes(self.layers) if reuse else None

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers in model order."""
        return self._decoder.layers

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that the calibration holds."""
        return self._calibration.leaves

    def measure(
        self, candidates: Sequence[Candidate], stage: Stage, part: Part = "selection", tokens: int = 0
    ) -> list[Measurement]:
        """Return a measurement of each candidate, in order.

        The model stage runs on ``tokens`` tokens of a part, rounded to whole pieces of its sequences; 0
        is all of them. Sensitivities are those on as many tokens, another window for each candidate.
        """
        if not candidates:
            return []
        for candidate in candidates:
            if len(candidate.ratios) != len(self.layers):
                raise ValueError(
                    f"expected {len(self.layers)} ratios, one a layer, got {len(candidate.ratios)}"
                )
            if candidate.group not in ("row", "layer"):
                raise ValueError(f"expected the group row or layer, got {candidate.group!r}")
        if stage == "sensitivity":
            return [self._sensitivity_stage(candidate, part, tokens) for candidate in candidates]
        if stage == "model":
            return [self._model_stage(candidate, part, tokens) for candidate in candidates]
        return self._layer_stage(candidates, stage)

    def summarise(
        self, metric: Expression, reductions: Sequence[Reduction]
    ) -> dict[Reduction, NDArray[np.float64]]:
        """Return reductions of a metric's scores on the dense model.

        Raises:
            ScoreError: When scores are not finite.
        """
        missing = [name for name in reductions if (metric, name) not in self._summaries]
        if missing:
            found = self._shard.summarise(metric, missing)
            self._summaries.update(((metric, name), values) for name, values in found.items())
        return {name: self._summaries[metric, name] for name in reductions}

    def masks(self, candidate: Candidate) -> Iterator[tuple[str, Tensor]]:
        """Yield each layer's name and which of its weights a candidate keeps, (rows, columns) bool.

        Raises:
            ScoreError: When scores are not finite.
        """
        for held in sorted(self._shard.held, key=lambda h: h.index):
            yield held.layer.name, ~held.mask(candidate, self._pattern)

    def close(self) -> None:
        """Free the threads and the model."""
        self._shard.close()
        self._references.clear()
        self._windows.clear()
        if self.prefixes:
            self.prefixes.clear()

    def _layer_stage(self, candidates: Sequence[Candidate], stage: Stage) -> list[Measurement]:
        start = time.perf_counter()
        found = self._shard.errors(candidates, all_rows=stage == "layer")
        seconds = (time.perf_counter() - start) / len(candidates)
        return [self._from_layers(results, stage, seconds) for results in found]

    def _from_layers(self, results: list[LayerResult] | str, stage: Stage, seconds: float) -> Measurement:
        if isinstance(results, str):
            return Measurement(stage, seconds=seconds, failure=results)
        errors = tuple(result.error for result in results)
        if not all(map(math.isfinite, errors)):
            return Measurement(stage, seconds=seconds, failure="the layers' errors are not finite")
        removed = sum(r.removed * layer.size for r, layer in zip(results, self.layers, strict=True))
        values = {
            "layer_error": sum(errors) / len(errors),
            "sparsity": removed / sum(layer.size for layer in self.layers),
        }
        digest = hashlib.blake2b(b"".join(r.digest for r in results), digest_size=16).hexdigest()
        return Measurement(stage, errors, values, seconds, fingerprint=digest)

    @torch.no_grad()
    def _model_stage(self, candidate: Candidate, part: Part, tokens: int) -> Measurement:
        reference = self._reference(part, tokens)
        start = time.perf_counter()
        known = self.prefixes.longest(candidate, (part, tokens)) if self.prefixes else None
        first, hidden, removed = known or Prefix(0, [batch.hidden for batch in reference.batches], 0)
        try:
            for block in range(first, len(self._decoder.blocks)):
                weights, count = self._shard.masked_weights(candidate, block)
                removed += count
                with self._decoder.with_weights(weights):
                    hidden = [
                        self._decoder.run_block(block, batch, states)
                        for batch, states in zip(reference.batches, hidden, strict=True)
                    ]
                if self.prefixes:
                    self.prefixes.keep(candidate, (part, tokens), Prefix(block + 1, hidden, removed))
            values, parts = reference.compare(self._decoder, hidden)
        except (ScoreError, MetricError) as error:
            return Measurement("model", seconds=time.perf_counter() - start, failure=str(error))
        seconds = time.perf_counter() - start
        if not all(map(math.isfinite, values.values())):
            return Measurement("model", (), {}, seconds, "the pruned model's output is not finite")
        values["sparsity"] = removed / sum(layer.size for layer in self.layers)
        return Measurement("model", (), values, seconds, tokens=reference.tokens, parts=parts)

    def _sensitivity_stage(self, candidate: Candidate, part: Part, tokens: int) -> Measurement:
        """Measure sensitivities on a window of a part, which the candidate's key chooses as if by chance."""
        if self._pattern != "unstructured":
            raise ValueError(f"expected ratios that can change for sensitivities, got {self._pattern}")
        ids = self._calibration.tokens(part)
        window = int(candidate.key, 16) % count_windows(ids, tokens)
        if (part, tokens, window) not in self._windows:
            # One window at a time, and without its probabilities: windows are many, and each is seldom met.
            self._windows.clear()
            self._windows[part, tokens, window] = Reference(self._decoder, window_of(ids, tokens, window), 0)
        reference = self._windows[part, tokens, window]
        start = time.perf_counter()
        try:
            found = sensitivities(self._decoder, self._shard, reference, candidate)
        except (ScoreError, MetricError) as error:
            return Measurement("sensitivity", seconds=time.perf_counter() - start, failure=str(error))
        seconds = time.perf_counter() - start
        if not all(map(math.isfinite, found)):
            return Measurement("sensitivity", (), {}, seconds, "the sensitivities are not finite")
        cost = FORWARD_PASSES * reference.tokens
        return Measurement("sensitivity", seconds=seconds, tokens=cost, sensitivities=found)

    def _reference(self, part: Part, tokens: int) -> Reference:
        if (part, tokens) not in self._references:
            # One part's log-probabilities at a time, but those of all its rungs.
            self._references = {k: r for k, r in self._references.items() if k[0] == part}
            ids = some_tokens(self._calibration.tokens(part), tokens)
            self._references[part, tokens] = Reference(self._decoder, ids)
        return self._references[part, tokens]


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
    """Return which weights are not those that were calibrated, empty for none."""
    if not calibration.entries[0].weights:  # format 1
        same = calibration.manifest["model"]["weights"] == decoder.fingerprint_of_format_1()
        return "" if same else "weights"
    pairs = zip(calibration.entries, decoder.fingerprints(), strict=True)
    other = [i for i, (entry, found) in enumerate(pairs) if entry.weights != found]
    return f"weights in {decoder.layers[other[0]].name}" if other else ""
