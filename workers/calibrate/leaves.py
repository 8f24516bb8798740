"""Leaves of one layer: its weights, what calibration holds, and what others have added computed from both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ...metrics_dsl.errors import MetricError
from ...metrics_dsl.operators import GRAM, LEAVES, Leaf
from .folder import LayerStatistics
from .gram import gram_matrix


def with_sources(names: Iterable[str]) -> frozenset[str]:
    """Return leaves and, of those that are computed, what they are computed from."""
    wanted = frozenset(names)
    return wanted.union(*(LEAVES[name].needs for name in wanted if name in LEAVES))


class _Needed(dict[str, Tensor]):
    """What a leaf is computed from, and nothing else."""

    def __missing__(self, name: str) -> Tensor:
        raise MetricError(f"a leaf is computed from {name}, which is not among its needs ({', '.join(self)})")


class LayerLeaves(Mapping[str, Tensor]):
    """A layer's leaves over all rows, two-dimensional, in 32-bit floats.

    Weights of 16 bits are widened when they are asked for. A leaf that is computed is so when it is first
    asked for, checked, and kept; what is wrong with it is said again to whoever asks later.

    Args:
        layer: What messages call the layer.
        weights: (rows, columns).
        statistics: What calibration holds of it.
    """

    def __init__(self, layer: str, weights: Tensor, statistics: LayerStatistics) -> None:
        self._layer = layer
        self._weights = weights
        self._held = statistics.leaves
        self._gram = statistics.gram
        self._computed: dict[str, Tensor | str] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name == "W":
            return self._weights.float()
        if name in self._held:
            return self._held[name]
        if name not in self:
            raise KeyError(name)
        if name not in self._computed:
            try:
                self._computed[name] = self.compute(LEAVES[name])
            except MetricError as error:
                self._computed[name] = str(error)
        found = self._computed[name]
        if isinstance(found, str):
            raise MetricError(found)
        return found

    def __contains__(self, name: object) -> bool:
        if name == "W" or name in self._held:
            return True
        leaf = LEAVES.get(str(name))
        return (
            leaf is not None and leaf.compute is not None and all(n == GRAM or n in self for n in leaf.needs)
        )

    def __iter__(self) -> Iterator[str]:
        yield "W"
        yield from self._held

    def __len__(self) -> int:
        return 1 + len(self._held)

    def compute(self, leaf: Leaf) -> Tensor:
        """Return a leaf that is computed from others, checked against its row.

        Raises:
            MetricError: When it is not what its row says.
        """
        assert leaf.compute is not None
        given = _Needed({n: gram_matrix(self._gram) if n == GRAM else self[n] for n in leaf.needs})
        found = leaf.compute(given)
        rows, columns = self._weights.shape
        wanted = (rows if leaf.shape.rows else 1, columns if leaf.shape.columns else 1)
        what = f"the leaf {leaf.name} cannot be used in the layer {self._layer}"
        if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise MetricError(
                f"{what}: expected a tensor of {wanted}, as its shape {leaf.shape} says, got {got}"
            )
        found = found.detach().to(self._weights.device, torch.float32)
        if not bool(found.isfinite().all()):
            raise MetricError(f"{what}: expected finite numbers, got some that are not")
        if leaf.nonnegative and bool((found < 0).any()):
            raise MetricError(
                f"{what}: expected numbers of 0 or more, as its row says, got {float(found.min()):g}"
            )
        return found


class RowsOfLeaves(Mapping[str, Tensor]):
    """Some rows of a layer's leaves, each taken when it is first asked for.

    Args:
        leaves: Over all rows.
        rows: Indices of the rows.
    """

    def __init__(self, leaves: Mapping[str, Tensor], rows: Tensor) -> None:
        self._leaves = leaves
        self._rows = rows
        self._taken: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._taken:
            leaf = self._leaves[name]
            self._taken[name] = leaf if leaf.shape[0] == 1 else leaf[self._rows]
        return self._taken[name]

    def __contains__(self, name: object) -> bool:
        return name in self._leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)
