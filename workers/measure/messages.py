"""What a stage passes from blocks to blocks, and the measurement that all blocks make together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...search.core.candidate import Candidate, Layer, Measurement, Part, Stage
from .sensitivity import FORWARD_PASSES
from .shard import LayerResult
from .windows import count_windows

LayerResults = list[LayerResult] | str  # one a layer, or why there are none


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
    """What leaves some blocks: hidden states, a batch each, and how many weights were removed so far.

    ``failure`` says why there are none.
    """

    hidden: Sequence[Tensor]
    removed: int = 0
    seconds: float = 0.0
    failure: str = ""


class BackwardState(NamedTuple):
    """What comes back through some blocks: the sensitivity of each of their layers, and gradients.

    ``gradients`` are those of kl by the hidden states that entered the blocks, a batch each.
    """

    of_layer: dict[int, float]
    gradients: Sequence[Tensor]
    seconds: float = 0.0
    failure: str = ""


def window_of_candidate(candidate: Candidate, part: Part, tokens: int, shape: tuple[int, int]) -> Window:
    """Return the window of a part (sequences, length) that a candidate's key chooses, as if by chance."""
    return Window(part, tokens, int(candidate.key, 16) % count_windows(*shape, tokens))


def layer_measurement(
    results: LayerResults, layers: Sequence[Layer], stage: Stage, seconds: float
) -> Measurement:
    """Return the measurement that the results of all layers make."""
    if isinstance(results, str):
        return Measurement(stage, seconds=seconds, failure=results)
    errors = tuple(result.error for result in results)
    if not all(map(math.isfinite, errors)):
        return Measurement(stage, seconds=seconds, failure="the layers' errors are not finite")
    removed = sum(r.removed * layer.size for r, layer in zip(results, layers, strict=True))
    values = {
        "layer_error": sum(errors) / len(errors),
        "sparsity": removed / sum(layer.size for layer in layers),
    }
    digest = hashlib.blake2b(b"".join(r.digest for r in results), digest_size=16).hexdigest()
    return Measurement(stage, errors, values, seconds, fingerprint=digest)


def sensitivity_measurement(of_layer: dict[int, float], tokens: int, last: BackwardState) -> Measurement:
    """Return the measurement that the sensitivities of all layers make.

    Args:
        of_layer: Sensitivities by position of the layer in the model.
        tokens: Tokens that they were found on.
        last: What came back through the first blocks, with the time that all took.
    """
    if last.failure:
        return Measurement("sensitivity", seconds=last.seconds, failure=last.failure)
    found = tuple(of_layer[index] for index in sorted(of_layer))
    if not all(map(math.isfinite, found)):
        return Measurement("sensitivity", (), {}, last.seconds, "the sensitivities are not finite")
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
