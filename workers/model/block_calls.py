"""Batches: sequences on their way through a model's blocks, with what each block is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import ModelError


@dataclass
class BlockCall:
    """What one block was called with; ``place`` says where the hidden states stand."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with other hidden states."""
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return args, self.kwargs
        return self.args, {**self.kwargs, self.place: hidden}


@dataclass
class Batch:
    """Some sequences on their way through the blocks.

    Attributes:
        ids: Token ids (sequences, tokens).
        hidden: Hidden states before the first block (sequences, tokens, width).
        calls: What each block is called with.
    """

    ids: Tensor
    hidden: Tensor
    calls: list[BlockCall]


def find_hidden(args: Sequence[Any], kwargs: dict[str, Any]) -> int | str:
    """Return where the hidden states are: the first three-dimensional floating tensor.

    Raises:
        ModelError: When there is none.
    """
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return place
    raise ModelError("expected the blocks to be called with hidden states (sequences, tokens, width)")


def hidden_of(call: BlockCall) -> Tensor:
    """Return the hidden states that a block was called with, (sequences, tokens, width)."""
    hidden: Tensor = call.args[call.place] if isinstance(call.place, int) else call.kwargs[call.place]
    return hidden


def check_arguments(batch: Batch) -> None:
    """Check that blocks are given no place where they leave something for each other.

    Of such a place nothing is kept with the hidden states, and no gradient flows through it.

    Raises:
        ModelError: When they are, such as the keys and values that blocks of Gemma 4 share.
    """
    for call in batch.calls:
        for name, value in call.kwargs.items():
            if not isinstance(value, Tensor) and hasattr(value, "__setitem__") and not len(value):
                raise ModelError(
                    "expected blocks that pass no more than hidden states to each other, got some that share "
                    f"{name}; this architecture cannot be measured block by block"
                )
