"""The local evaluator: one model, one process, on the CPU or one GPU."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics_dsl.expression import MetricError
from ..search.candidate import Candidate, Layer, Measurement, Part, Stage, parse_pattern
from .decoder import Batch, Decoder
from .model import choose_device, choose_dtype, load_model
from .shard import SCREEN_ROWS, LayerResult, ScoreError, Shard
from .statistics import Calibration, CalibrationError

# Tokens that go through a block at a time: more spill out of a CPU's caches, fewer starve a GPU.
_TOKENS_A_CALL = {"cpu": 1024, "cuda": 8192}
# Tokens whose logits exist at a time; over a whole vocabulary they are the largest tensors of all.
_TOKENS_OF_LOGITS = {"cpu": 128, "cuda": 1024}
# Dense log-probabilities are kept up to this size and computed again for each candidate beyond it.
_KEPT_BYTES = 1 << 30


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
        self._references: dict[Part, _Reference] = {}

    @property
    def layers(self) -> Sequence[Layer]:
        """The prunable layers in model order."""
        return self._decoder.layers

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves that the calibration holds."""
        return self._calibration.leaves

    def measure(
        self, candidates: Sequence[Candidate], stage: Stage, part: Part = "selection"
    ) -> list[Measurement]:
        """Return a measurement of each candidate, in order."""
        if not candidates:
            return []
        for candidate in candidates:
            if len(candidate.ratios) != len(self.layers):
                raise ValueError(
                    f"expected {len(self.layers)} ratios, one a layer, got {len(candidate.ratios)}"
                )
            if candidate.group not in ("row", "layer"):
                raise ValueError(f"expected the group row or layer, got {candidate.group!r}")
        if stage == "model":
            return [self._model_stage(candidate, part) for candidate in candidates]
        return self._layer_stage(candidates, stage)

    def close(self) -> None:
        """Free the threads and the model."""
        self._shard.close()
        self._references.clear()

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
    def _model_stage(self, candidate: Candidate, part: Part) -> Measurement:
        reference = self._reference(part)
        start = time.perf_counter()
        hidden = [batch.hidden for batch in reference.batches]
        removed = 0
        try:
            for block in range(len(self._decoder.blocks)):
                weights, count = self._shard.masked_weights(candidate, block)
                removed += count
                with self._decoder.with_weights(weights):
                    hidden = [
                        self._decoder.run_block(block, batch, states)
                        for batch, states in zip(reference.batches, hidden, strict=True)
                    ]
            values = reference.compare(self._decoder, hidden)
        except (ScoreError, MetricError) as error:
            return Measurement("model", seconds=time.perf_counter() - start, failure=str(error))
        seconds = time.perf_counter() - start
        if not all(map(math.isfinite, values.values())):
            return Measurement("model", (), {}, seconds, "the pruned model's output is not finite")
        values["sparsity"] = removed / sum(layer.size for layer in self.layers)
        return Measurement("model", (), values, seconds)

    def _reference(self, part: Part) -> _Reference:
        if part not in self._references:
            self._references.clear()  # one part's log-probabilities at a time
            self._references[part] = _Reference(self._decoder, self._calibration.tokens(part))
        return self._references[part]


def _check_same_model(decoder: Decoder, calibration: Calibration) -> None:
    expected = [(layer.name, layer.rows, layer.columns) for layer in calibration.layers]
    got = [(layer.name, layer.rows, layer.columns) for layer in decoder.layers]
    if expected != got or calibration.manifest["model"]["weights"] != decoder.fingerprint():
        raise CalibrationError(
            f"expected the model that {calibration.folder} was calibrated on, got one with other "
            f"{'layers' if expected != got else 'weights'}; calibrate this model, or name the right "
            "one with --model"
        )


class _Dense:
    """What the dense model does with a piece of a sequence, ids (1, tokens).

    The divergence from p to q is sum p (z_p - z_q) + log-normaliser of q - log-normaliser of p, z being
    logits: only p has to be kept of the dense model, and nothing as large as it is made for a pruned
    one. Where keeping p would take too much memory it follows from the last hidden states again.
    """

    def __init__(
        self, decoder: Decoder, ids: Tensor, following: Tensor, hidden: Tensor, *, keep: bool
    ) -> None:
        self._ids = ids
        self._following = following  # (1, tokens), or one fewer at the end of a sequence
        self._hidden = hidden
        self._final, logits = decoder.leave(ids, hidden)
        self._normaliser = logits.logsumexp(-1)
        probabilities = (logits - self._normaliser[..., None]).exp_()
        self._expected = torch.linalg.vecdot(probabilities, logits)
        self._kept = probabilities if keep else None

    def compare(self, decoder: Decoder, hidden: Tensor) -> dict[str, float]:
        """Return sums over the tokens: divergence, negative log-likelihood, error and energy."""
        final, logits = decoder.leave(self._ids, hidden)
        normaliser = logits.logsumexp(-1)
        got = torch.linalg.vecdot(self._probabilities(decoder), logits)
        divergence = (self._expected - got).double() + (normaliser - self._normaliser).double()
        count = self._following.shape[1]
        chosen = logits[:, :count].gather(-1, self._following[..., None])[..., 0]
        return {
            "divergence": float(divergence.sum()),
            "surprise": float((normaliser[:, :count] - chosen).double().sum()),
            "error": float((final - self._final).double().square().sum()),
            "energy": float(self._final.double().square().sum()),
        }

    def _probabilities(self, decoder: Decoder) -> Tensor:
        if self._kept is not None:
            return self._kept
        _, logits = decoder.leave(self._ids, self._hidden)
        return (logits - self._normaliser[..., None]).exp_()


class _Reference:
    """One part of the tokens with the dense model's outputs, to compare pruned models with."""

    def __init__(self, decoder: Decoder, ids: Tensor) -> None:
        kind = decoder.device.type
        size = max(1, _TOKENS_A_CALL.get(kind, 1024) // ids.shape[1])
        self._piece = _TOKENS_OF_LOGITS.get(kind, 128)
        self.batches: list[Batch] = [decoder.enter(part) for part in ids.split(size)]
        self._pieces: list[_Dense] = []
        vocabulary = decoder.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        room = _KEPT_BYTES // (4 * vocabulary)
        for batch in self.batches:
            states = batch.hidden
            for block in range(len(decoder.blocks)):
                states = decoder.run_block(block, batch, states)
            for sequence, state in zip(batch.ids.split(1), states.split(1), strict=True):
                following = sequence[:, 1:].split(self._piece, 1)
                pieces = sequence.split(self._piece, 1), self._split(state)
                for i, (piece, hidden) in enumerate(zip(*pieces, strict=True)):
                    room -= piece.numel()
                    after = following[i] if i < len(following) else sequence[:, :0]
                    self._pieces.append(_Dense(decoder, piece, after, hidden, keep=room >= 0))
        self._tokens = ids.numel()
        self._predicted = ids.numel() - len(ids)

    def _split(self, state: Tensor) -> tuple[Tensor, ...]:
        pieces: tuple[Tensor, ...] = state.split(self._piece, 1)
        return pieces

    def compare(self, decoder: Decoder, hidden: Sequence[Tensor]) -> dict[str, float]:
        """Return kl, perplexity and model_error of a pruned model from its last hidden states."""
        total: Counter[str] = Counter()
        pruned = (piece for states in hidden for state in states.split(1) for piece in self._split(state))
        for dense, state in zip(self._pieces, pruned, strict=True):
            for name, value in dense.compare(decoder, state).items():
                total[name] += value  # type: ignore[assignment]
        surprise = total["surprise"] / self._predicted
        return {
            "kl": max(total["divergence"] / self._tokens, 0.0),  # rounding may reach below 0
            "perplexity": math.exp(surprise) if surprise < 700 else math.inf,
            "model_error": total["error"] / total["energy"] if total["energy"] else 0.0,
        }
