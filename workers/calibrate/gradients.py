"""Gradients of the dense model's loss, a block at a time on the way back from the last block to the first.

Of the forward pass no more than the hidden states between the blocks are kept, in a file; each block runs
again on its way back. So the weights and gradients of one block at a time need to be in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..model.block_calls import Batch, check_arguments
from ..model.decoder import Decoder, weight_matrix
from ..model.errors import ModelError


@contextmanager
def hidden_states(folder: Path, decoder: Decoder, ids: Tensor, like: Tensor) -> Iterator[Tensor]:
    """Give room in a file for the hidden states before each block and after the last.

    The file is mapped into memory and has no name, so that nothing is left whatever happens: of many tokens
    the states are larger than a model.

    Args:
        folder: Where to put it.
        decoder: The model.
        ids: Token ids, (sequences, tokens).
        like: Hidden states (any, any, width), for their width and type.

    Returns:
        A tensor (blocks + 1, sequences, tokens, width) on the CPU.

    Raises:
        OSError: When the disk has not as much room.
    """
    shape = (len(decoder.blocks) + 1, *ids.shape, like.shape[-1])
    path = folder / "hidden-states"
    try:
        _reserve(path, math.prod(shape) * like.element_size(), ids.numel())
        states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=like.dtype)
        with suppress(PermissionError):  # Windows keeps the names of mapped files
            path.unlink()
        yield states.view(shape)
    finally:
        with suppress(PermissionError):
            path.unlink(missing_ok=True)


def _reserve(path: Path, size: int, tokens: int) -> None:
    """Make a file of ``size`` bytes for which the disk has set room aside.

    Without, a disk that becomes full ends the process while it writes to the mapped file.
    """
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # macOS, Windows
                file.truncate(size)
    except OSError as error:
        needed = f"{error.strerror}: hidden states of {tokens:,} tokens take {size:,} bytes"
        raise OSError(error.errno, needed, str(path.parent)) from None


def keep_states(states: Tensor, place: int, hidden: Sequence[Tensor]) -> None:
    """Copy hidden states, each (some sequences, tokens, width), to their place in those of all blocks.

    Raises:
        ModelError: When they have another type, in which they would not be the same.
    """
    if hidden[0].dtype != states.dtype:
        raise ModelError(
            f"expected hidden states of one type for gradients, got {hidden[0].dtype} after {states.dtype}; "
            "try --dtype float32, or do without the leaf G"
        )
    for room, own in zip(states[place].split([len(h) for h in hidden]), hidden, strict=True):
        room.copy_(own)


def root_mean_square_gradients(
    decoder: Decoder, ids: Tensor, states: Tensor
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Yield each block, the last first, with G of its layers, (rows, columns) in 32-bit floats, by position.

    The loss of a sequence is its mean next-token loss, the model is in evaluation mode (dropout would
    make G random), and squares are summed over sequences in 32-bit floats (16-bit ones overflow).

    Args:
        decoder: The dense model.
        ids: Token ids, (sequences, tokens).
        states: Hidden states before each block and after the last, as of ``hidden_states``.

    Raises:
        ModelError: When blocks pass more to each other than hidden states.
    """
    batches = [decoder.enter(sequence) for sequence in ids.split(1)]
    check_arguments(batches[0])
    gradients = [
        _gradient_of_loss(decoder, batch, state)
        for batch, state in zip(batches, states[-1].split(1), strict=True)
    ]
    for block in reversed(range(len(decoder.blocks))):
        with decoder.weights.of(block):
            sums, gradients = _way_back(decoder, block, batches, states[block], gradients)
        yield block, {i: total.div_(len(ids)).sqrt_().contiguous() for i, total in sums.items()}
        del sums  # before the next block's come


@torch.enable_grad()
def _gradient_of_loss(decoder: Decoder, batch: Batch, state: Tensor) -> Tensor:
    hidden = state.to(decoder.device).requires_grad_(True)
    (found,) = torch.autograd.grad(decoder.loss(batch.ids, hidden), hidden)
    return found


@torch.enable_grad()
def _way_back(
    decoder: Decoder, block: int, batches: list[Batch], states: Tensor, gradients: list[Tensor]
) -> tuple[dict[int, Tensor], list[Tensor]]:
    """Return the summed squares of a block's gradients, and the gradient by the hidden states before it."""
    weights = {
        i: weight_matrix(decoder.modules[i]).requires_grad_(True)
        for i, layer in enumerate(decoder.layers)
        if layer.block == block
    }
    sums = {i: torch.zeros_like(weight, dtype=torch.float32) for i, weight in weights.items()}
    before = []
    for batch, state, gradient in zip(batches, states.split(1), gradients, strict=True):
        hidden = state.to(decoder.device).requires_grad_(True)
        output = decoder.run_block_with(block, batch, hidden, weights)
        # An expert that no token reached has no gradient.
        own, *found = torch.autograd.grad(output, [hidden, *weights.values()], gradient, allow_unused=True)
        for total, value in zip(sums.values(), found, strict=True):
            if value is not None:
                total.addcmul_(value.float(), value.float())
        before.append(torch.zeros_like(hidden) if own is None else own)
    return sums, before
