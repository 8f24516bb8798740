"""A shard: the decoder blocks that one worker holds, with what it needs to measure their layers."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression, MetricError
from ...metrics_dsl.order import order_form
from ...metrics_dsl.score import Scorer
from ...search.core.candidate import Candidate, Failure, Layer, Reduction
from ..calibrate.folder import Calibration, LayerStatistics
from ..calibrate.gram import relative_error
from ..calibrate.leaves import LayerLeaves, RowsOfLeaves
from ..model.decoder import Decoder, weight_matrix
from .masks import below, packed, ranks, removed, soft_mask
from .score_summary import of_block, quantiles

SCREEN_ROWS = 32
_KEPT_REDUCTIONS = 64  # a layer; each is one row or column of numbers
ORDER_BYTES = 1 << 29  # orders of scores that are kept, two bytes per weight and metric
_METRICS_SEEN = 4096
S = TypeVar("S")
T = TypeVar("T")


class ScoreError(SecateurError):
    """Scores that cannot rank a layer's weights; the message becomes the candidate's failure."""


class LayerResult(NamedTuple):
    """What pruning some rows of one layer does: error, fraction removed, digest of the mask."""

    error: float
    removed: float
    digest: bytes


class _Recent(OrderedDict[Expression, tuple[Tensor, ...]]):
    """Reductions of one layer, the oldest dropped first."""

    def __setitem__(self, key: Expression, value: tuple[Tensor, ...]) -> None:
        super().__setitem__(key, value)
        if len(self) > _KEPT_REDUCTIONS:
            self.popitem(last=False)


class HeldLayer:
    """A layer with its dense weights, statistics and the rows that the screen looks at."""

    def __init__(
        self, index: int, layer: Layer, weights: Tensor, statistics: LayerStatistics, rows: int
    ) -> None:
        self.index = index
        self.layer = layer
        self.weights = weights
        self.gram = statistics.gram
        self.energy = statistics.energy
        self.leaves = LayerLeaves(layer.name, weights, statistics)
        chosen = sample_rows(layer.rows, rows, seed=index).to(weights.device)
        self.sampled = RowsOfLeaves(self.leaves, chosen)
        self.sampled_energy = statistics.energy[chosen]
        self.reduced = _Recent()
        self.orders: dict[tuple[Expression, str], Tensor] = {}

    def scores(self, scorer: Scorer, form: Expression, rows: int) -> Tensor:
        """Return the scores (rows, columns) of an order form.

        Raises:
            ScoreError: When they are not finite.
        """
        scores = scorer.score(form).expand(rows, self.layer.columns)
        low, high = torch.aminmax(scores)
        if not bool((high - low).isfinite()):
            raise ScoreError(f"the scores of `{form}` are not finite in the layer {self.layer.name}")
        return scores

    def mask(self, candidate: Candidate, pattern: str, *, keep_order: bool = False) -> Tensor:
        """Return which weights a candidate removes, (rows, columns) bool.

        With ``keep_order`` the order of the scores is kept, from which masks at other ratios follow.
        """
        ratio, group = candidate.ratios[self.index], candidate.group
        form = order_form(candidate.metric, group)
        if (form, group) not in self.orders and not keep_order:
            return removed(self.dense_scores(form), ratio, group, pattern)
        return below(self.order(candidate, keep=keep_order), ratio, group)

    def order(self, candidate: Candidate, *, keep: bool) -> Tensor:
        """Return the places of the weights in the order of a candidate's scores, (rows, columns)."""
        key = order_form(candidate.metric, candidate.group), candidate.group
        if key in self.orders:
            return self.orders[key]
        found = ranks(self.dense_scores(key[0]), candidate.group)
        if keep:
            self.orders[key] = found
        return found

    def dense_scores(self, metric: Expression) -> Tensor:
        """Return the scores of all weights, (rows, columns).

        Raises:
            ScoreError: When they are not finite.
        """
        return self.scores(Scorer(self.leaves, None, self.reduced), metric, self.layer.rows)

    def results(
        self, candidates: Sequence[Candidate], pattern: str, *, all_rows: bool
    ) -> list[LayerResult | Failure]:
        """Return a result of each candidate."""
        sampled = self.leaves if all_rows else self.sampled
        energy = self.energy if all_rows else self.sampled_energy
        scorer = Scorer(self.leaves, None if all_rows else sampled, self.reduced)
        found: list[LayerResult | Failure] = []
        for candidate in candidates:
            form = order_form(candidate.metric, candidate.group)
            try:
                scores = self.scores(scorer, form, len(energy))
            except (ScoreError, MetricError) as error:
                found.append(Failure(str(error)))
                continue
            mask = removed(scores, candidate.ratios[self.index], candidate.group, pattern)
            relative = relative_error(sampled["W"], mask, self.gram, energy)
            share = int(mask.count_nonzero()) / mask.numel()
            found.append(LayerResult(relative, share, hashlib.blake2b(packed(mask), digest_size=16).digest()))
        return found


def all_or_failure(parts: Iterable[T | Failure]) -> list[T] | Failure:
    """Return all parts, or why the first of those that are missing is missing."""
    found: list[T] = []
    for part in parts:
        if isinstance(part, Failure):
            return part
        found.append(part)
    return found


def sample_rows(rows: int, count: int, seed: int) -> Tensor:
    """Return the sorted indices of ``count`` rows drawn without replacement, all if there are fewer."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def layers_at_a_time(device: str, threads: int) -> int:
    """Return how many layers are measured at once: a core each, but one on a GPU, which that keeps busy."""
    return 1 if device == "cuda" else threads or len(os.sched_getaffinity(0))


class Shard:
    """The layers of some blocks, measured in parallel.

    Args:
        decoder: The dense model.
        calibration: Its calibration.
        pattern: ``unstructured`` or ``N:M``.
        rows: Rows per layer that the screen looks at.
        threads: Layers measured at a time; one thread of arithmetic each.
        blocks: The blocks; all if left out.
    """

    def __init__(
        self,
        decoder: Decoder,
        calibration: Calibration,
        *,
        pattern: str = "unstructured",
        rows: int = SCREEN_ROWS,
        threads: int | None = None,
        blocks: range | None = None,
    ) -> None:
        device = decoder.device
        self.pattern = pattern
        self.held: list[HeldLayer] = []
        for block in range(len(decoder.blocks)) if blocks is None else blocks:
            for index, statistics in calibration.block(block, device).items():
                weights = weight_matrix(decoder.modules[index])
                self.held.append(HeldLayer(index, decoder.layers[index], weights, statistics, rows))
        self._pool = ThreadPoolExecutor(layers_at_a_time(device.type, threads or 0), initializer=_one_thread)
        self._uses: OrderedDict[tuple[Expression, str], tuple[int, str]] = OrderedDict()
        self._ordered: dict[tuple[Expression, str], None] = {}

    def errors(self, candidates: Sequence[Candidate], *, all_rows: bool) -> list[list[LayerResult] | Failure]:
        """Return for each candidate a result a layer."""

        def measure(held: HeldLayer) -> list[LayerResult | Failure]:
            return held.results(candidates, self.pattern, all_rows=all_rows)

        by_layer = self._each(measure, self.held)
        return [all_or_failure(row) for row in zip(*by_layer, strict=True)]

    def masked_weights(self, candidate: Candidate, block: int) -> tuple[dict[int, Tensor], int]:
        """Return a block's pruned weights by layer index, and how many were removed.

        Raises:
            ScoreError: When scores are not finite.
        """
        keep_order = self._keeps_order(candidate)

        def prune(held: HeldLayer) -> tuple[int, Tensor, int]:
            mask = held.mask(candidate, self.pattern, keep_order=keep_order)
            # A product with the kept ones takes a quarter of the time of masked_fill on the CPU.
            return held.index, held.weights * ~mask, int(mask.count_nonzero())

        pruned = self._each(prune, self.of_block(block))
        return {i: weights for i, weights, _ in pruned}, sum(count for _, _, count in pruned)

    def soft_weights(
        self, candidate: Candidate, block: int, ratios: Mapping[int, Tensor], half_width: float
    ) -> dict[int, Tensor]:
        """Return a block's weights under masks with soft edges, by layer index, differentiable in ratios.

        Args:
            candidate: Says how the weights are ordered.
            block: The block.
            ratios: A number as a tensor for each layer of the block, by layer index.
            half_width: Half of the edge's width, as a share of the group.

        Raises:
            ScoreError: When scores are not finite.
        """
        keep_order = self._keeps_order(candidate)

        def soften(held: HeldLayer) -> tuple[int, Tensor]:
            order = held.order(candidate, keep=keep_order)
            kept = soft_mask(order, ratios[held.index], candidate.group, half_width)
            return held.index, held.weights * kept.to(held.weights.dtype)

        return dict(self._each(soften, self.of_block(block)))

    def of_block(self, block: int) -> list[HeldLayer]:
        """Return a block's layers, large ones first: so no core is idle at the end."""
        return sorted((h for h in self.held if h.layer.block == block), key=lambda h: -h.layer.size)

    def summarise(
        self, metric: Expression, reductions: Sequence[Reduction]
    ) -> dict[Reduction, NDArray[np.float64]]:
        """Return reductions of a metric's scores, one number a block, or quantiles a layer.

        Raises:
            ScoreError: When scores are not finite.
        """
        blocks = sorted({held.layer.block for held in self.held})
        found: dict[Reduction, list[float | NDArray[np.float64]]] = {name: [] for name in reductions}
        for block in blocks:
            held = [h for h in self.held if h.layer.block == block]
            scores = self._each(lambda h: h.dense_scores(metric), held)
            for name in reductions:
                if name == "quantiles":
                    found[name] += self._each(quantiles, scores)
                else:
                    found[name].append(of_block(scores, name, self._each))
        return {name: np.array(values) for name, values in found.items()}

    def _keeps_order(self, candidate: Candidate) -> bool:
        """Whether a metric's order is kept: from its third candidate on, where it fits.

        Finding an order takes two to three times as long as one mask, so a metric that is met with few
        ratios is better off without. One that is met more often takes the place of the rarest.
        """
        if self.pattern != "unstructured":
            return False
        name = order_form(candidate.metric, candidate.group), candidate.group
        count, last = self._uses.pop(name, (0, ""))
        if last != candidate.key:
            count += 1
        self._uses[name] = count, candidate.key
        while len(self._uses) > _METRICS_SEEN:
            self._uses.popitem(last=False)
        width = 4 if candidate.group == "layer" else 2
        room = ORDER_BYTES // (width * sum(held.layer.size for held in self.held))
        if name in self._ordered:
            return True
        if count < 3 or not room:
            return False
        while len(self._ordered) >= room:
            rarest = min(self._ordered, key=lambda other: self._uses.get(other, (0, ""))[0])
            if self._uses.get(rarest, (0, ""))[0] >= count:
                return False
            del self._ordered[rarest]
            for held in self.held:
                held.orders.pop(rarest, None)
        self._ordered[name] = None
        return True

    def forget(self) -> None:
        """Free the orders of scores that are kept."""
        self._ordered.clear()
        for held in self.held:
            held.orders.clear()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _each(self, work: Callable[[S], T], held: Iterable[S]) -> list[T]:
        futures = [self._pool.submit(work, layer) for layer in held]
        try:
            return [future.result() for future in futures]
        except BaseException:  # an interrupt must not wait for the layers that are queued
            for future in futures:
                future.cancel()
            raise


def _one_thread() -> None:
    torch.set_num_threads(1)
