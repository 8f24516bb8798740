"""Prefixes: hidden states of pruned models, kept for candidates that agree on the first blocks.

A candidate that differs from another only from block b on has the same hidden states before b, exactly:
they come out of the same computation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...search.core.candidate import Candidate, Layer

KEPT_BYTES = 1 << 29
CHAINS = 3  # candidates whose states should fit; where they do not, some blocks are left out


class Prefix(NamedTuple):
    """Hidden states before a block, a tensor a batch, and the weights removed in the blocks before."""

    block: int
    hidden: list[Tensor]
    removed: int


class Prefixes:
    """The states of the candidates measured last, the oldest dropped first.

    Attributes:
        blocks: Blocks that candidates went through or would have gone through.
        reused: Blocks among them whose states were known.
    """

    def __init__(self, layers: Sequence[Layer], kept_bytes: int = KEPT_BYTES) -> None:
        self._blocks_of_layers = [layer.block for layer in layers]
        self._kept_bytes = kept_bytes
        self._bytes = 0
        self._states: OrderedDict[tuple[object, ...], Prefix] = OrderedDict()
        self.blocks = self.reused = 0

    def longest(self, candidate: Candidate, tokens: object, blocks: range) -> Prefix | None:
        """Return the states of a candidate that are known furthest into some blocks.

        Args:
            candidate: Whose states are wanted.
            tokens: What the states are of: those on other tokens do not count.
            blocks: The blocks to run; the more of them the states have behind them, the fewer are left.

        Returns:
            The states, or None where not even those behind the first of the blocks are known.
        """
        self.blocks += len(blocks)
        for block in range(blocks.stop, blocks.start, -1):
            key = self._key(candidate, tokens, block)
            if key in self._states:
                self.reused += block - blocks.start
                # Whoever wants these states again may also want those on the way to them.
                for before in range(block, blocks.start, -1):
                    if (touched := self._key(candidate, tokens, before)) in self._states:
                        self._states.move_to_end(touched)
                return self._states[key]
        return None

    def keep(self, candidate: Candidate, tokens: object, prefix: Prefix) -> None:
        """Keep the states before a block, if there is room for states at this spacing."""
        size = sum(states.numel() * states.element_size() for states in prefix.hidden)
        spacing = -(-size * (self._blocks_of_layers[-1] + 1) * CHAINS // self._kept_bytes)
        if prefix.block % spacing or size > self._kept_bytes:
            return
        self._states[self._key(candidate, tokens, prefix.block)] = prefix
        self._bytes += size
        while self._bytes > self._kept_bytes:
            _, dropped = self._states.popitem(last=False)
            self._bytes -= sum(states.numel() * states.element_size() for states in dropped.hidden)

    def clear(self) -> None:
        """Forget all states."""
        self._states.clear()
        self._bytes = 0

    def _key(self, candidate: Candidate, tokens: object, block: int) -> tuple[object, ...]:
        metric, group, ratios = candidate.order_key
        return tokens, metric, group, block, ratios[: bisect_left(self._blocks_of_layers, block)]
