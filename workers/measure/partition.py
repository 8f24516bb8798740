"""How a model's blocks are split over shards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from ...metrics_dsl.errors import SecateurError
from ...search.core.candidate import Layer


def split_blocks(layers: Sequence[Layer], shards: int) -> list[range]:
    """Return contiguous ranges of blocks whose largest load, the sum of rows x columns^2, is least.

    Raises:
        SecateurError: For more shards than blocks.
    """
    count = layers[-1].block + 1
    if shards > count:
        raise SecateurError(f"expected at most {count} shards, one a block, got {shards}")
    loads = [0] * count
    for layer in layers:
        loads[layer.block] += layer.rows * layer.columns**2
    before = [0, *accumulate(loads)]
    # best[b]: least largest load of the first b blocks over as many shards as have been handled, and the cut.
    best: list[tuple[float, tuple[int, ...]]] = [(before[b], (0,)) for b in range(count + 1)]
    for done in range(1, shards):
        best = [
            min(
                (
                    (max(best[cut][0], before[end] - before[cut]), (*best[cut][1], cut))
                    for cut in range(done, end)
                ),
                default=(float("inf"), (0,)),
            )
            for end in range(count + 1)
        ]
    cuts = [*best[count][1], count]
    return [range(start, end) for start, end in pairwise(cuts)]
