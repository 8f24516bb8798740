"""How a model's blocks are split over shards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from ...metrics_dsl.errors import SecateurError
from ...search.core.candidate import Layer


def split_blocks(layers: Sequence[Layer], shards: int, count: int) -> list[range]:
    """Return contiguous ranges of all blocks whose largest load, the sum of rows x columns^2, is least.

    Each has layers: blocks without any go with those before them.

    Args:
        layers: The prunable layers.
        shards: How many ranges.
        count: How many blocks the model has.

    Raises:
        SecateurError: For more shards than blocks with layers.
    """
    own = sorted({layer.block for layer in layers})
    if shards > len(own):
        raise SecateurError(f"expected at most {len(own)} shards, one a block, got {shards}")
    loads = dict.fromkeys(own, 0)
    for layer in layers:
        loads[layer.block] += layer.rows * layer.columns**2
    before = [0, *accumulate(loads.values())]
    # best[b]: least largest load of the first b blocks over as many shards as have been handled, and the cut.
    best: list[tuple[float, tuple[int, ...]]] = [(before[b], (0,)) for b in range(len(own) + 1)]
    for done in range(1, shards):
        best = [
            min(
                (
                    (max(best[cut][0], before[end] - before[cut]), (*best[cut][1], cut))
                    for cut in range(done, end)
                ),
                default=(float("inf"), (0,)),
            )
            for end in range(len(own) + 1)
        ]
    cuts = [0, *(own[cut] for cut in best[len(own)][1][1:]), count]
    return [range(start, end) for start, end in pairwise(cuts)]
