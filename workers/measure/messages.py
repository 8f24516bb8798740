"""What a stage passes from blocks to blocks, and the measurement that all blocks make together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...search.core.candidate import Candidate, Failure, Layer, Measurement, Part, Stage
from .sensitivity import FORWARD_PASSES
from .shard import LayerResult
from .windows import count_windows

LayerResults = list[LayerResult] | Failure  # one a layer


class Window(NamedTuple):
    """Which tokens to run on.

    Attributes:
        part: The part of the calibration tokens.
        tokens: How many of it; 0 is all.
        number: Which of the windows of so many tokens that the part has, counted from 0; None takes the
            beginnings of its first sequences.
    """

    part: Part
    tokens: int
    number: int | None = None


class ForwardState(NamedTuple):
    """What leaves some blocks: hidden states, a batch each, and how many weights were removed so far."""

    hidden: Sequence[Tensor]
    removed: int = 0
    seconds: float = 0.0


class BackwardState(NamedTuple):
    """What comes back through some blocks: the sensitivity of each of their layers, and gradients.

    ``gradients`` are those of kl by the hidden states that entered the blocks, a batch each.
    """

    of_layer: dict[int, float]
    gradients: Sequence[Tensor]
    seconds: float = 0.0


def window_of_candidate(candidate: Candidate, part: Part, tokens: int, shape: tuple[int, int]) -> Window:
    """Return the window of a part (sequences, length) that a candidate's key chooses, as if by chance."""
    return Window(part, tokens, int(candidate.key, 16) % count_windows(*shape, tokens))


def layer_measurement(
    results: LayerResults, layers: Sequence[Layer], stage: Stage, seconds: float
) -> Measurement:
    """Return the measurement that the results of all layers make."""
    if isinstance(results, Failure):
        return results.of(stage, seconds)
    errors = tuple(result.error for result in results)
    if not all(map(math.isfinite, errors)):
        return Failure("the layers' errors are not finite", seconds).of(stage)
    removed = sum(r.removed * layer.size for r, layer in zip(results, layers, strict=True))
    values = {
        "layer_error": sum(errors) / len(errors),
        "sparsity": removed / sum(layer.size for layer in layers),
    }
    digest = hashlib.blake2b(b"".join(r.digest for r in results), digest_size=16).hexdigest()
    return Measurement(stage, errors, values, seconds, fingerprint=digest)


def sensitivity_measurement(last: BackwardState | Failure, tokens: int) -> Measurement:
    """Return the measurement that the sensitivities of all layers make.

    Args:
        last: What came back through the first blocks, of all layers and with the time that all took.
        tokens: Tokens that they were found on.
    """
    if isinstance(last, Failure):
        return last.of("sensitivity")
    found = tuple(last.of_layer[index] for index in sorted(last.of_layer))
    if not all(map(math.isfinite, found)):
        return Failure("the sensitivities are not finite", last.seconds).of("sensitivity")
    cost = FORWARD_PASSES * tokens
    return Measurement("sensitivity", seconds=last.seconds, tokens=cost, sensitivities=found)


def check_candidates(candidates: Sequence[Candidate], layers: Sequence[Layer]) -> None:
    """Check that candidates fit a model.

    Raises:
        SecateurError: For another number of ratios than layers.
    """
    for candidate in candidates:
        if len(candidate.ratios) != len(layers):
            raise SecateurError(f"expected {len(layers)} ratios, one a layer, got {len(candidate.ratios)}")
