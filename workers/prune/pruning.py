"""Pruning: one rule applied to a model, block by block; the weights of one block need to be in memory.

The order of things is that of Wanda's published procedure (Sun et al. 2024, arXiv 2306.11695): all layers
of a block are measured on the dense block, one sequence at a time, then pruned. With ``sequential``
statistics the block runs again, and what the pruned block returns is what the next one is measured on; with
``one-shot`` statistics every block is measured on what the dense ones return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression
from ...search.core.candidate import Candidate, Layer, Reduction, parse_pattern
from ...search.core.scratch import scratch
from ..calibrate.calibration import check_composition
from ..calibrate.folder import LayerStatistics
from ..calibrate.gradients import hidden_states, keep_states, root_mean_square_gradients
from ..calibrate.gram import quadratic_form
from ..calibrate.input_statistics import Observer, observed_outputs
from ..calibrate.leaves import with_sources
from ..measure.score_summary import of_block, quantiles
from ..measure.shard import HeldLayer
from ..model.block_calls import Batch
from ..model.decoder import Decoder, oriented, weight_matrix, weight_of
from .repair import REPAIRS

STATISTICS = ("one-shot", "sequential")


class PruningError(SecateurError):
    """A model that a rule cannot be applied to."""


@dataclass(frozen=True)
class PrunedLayer:
    """What was done to one layer.

    Attributes:
        layer: The layer.
        ratio: The ratio that the rule gives it.
        zeros: Weights that are 0 now.
        error: Relative squared error of its outputs by the mask alone, on the tokens of its statistics.
        repaired: The same after the repair, without what a bias makes up for.
        shifted: Whether its bias was shifted.
    """

    layer: Layer
    ratio: float
    zeros: int
    error: float
    repaired: float
    shifted: bool


class Pruner:
    """Prunes one decoder in place; the statistics of one block exist at a time.

    Layers whose inputs are not known on these tokens, by the dense model, are none from then on.

    Args:
        decoder: The dense model.
        ids: Token ids of the statistics, (sequences, tokens).

    Raises:
        ModelError: When the model's blocks do not run one by one, or no layer is left.
    """

    def __init__(self, decoder: Decoder, ids: Tensor) -> None:
        self._decoder = decoder
        self._ids = ids
        self._gradients: dict[int, Tensor] = {}
        self._left: dict[str, str] = {}
        # One at a time, as published: with more, sums of floats and so near ties would fall otherwise.
        self._batches = [decoder.enter(sequence) for sequence in ids.split(1)]
        with torch.no_grad():
            unknown, left = self._unknown(self._batches[:1])
            check_composition(decoder, ids[:1], left[0])
            if unknown:  # most models have none: whatever they have, one sequence reaches
                unknown, _ = self._unknown(self._batches)
        decoder.leave_dense(unknown)

    def _unknown(self, batches: list[Batch]) -> tuple[dict[str, str], list[Tensor]]:
        """Return why layers stay dense, by name, and what leaves the last block of the dense model."""
        decoder = self._decoder
        unknown: dict[str, str] = {}
        hidden = [batch.hidden for batch in batches]
        for block in range(len(decoder.blocks)):
            indexes = [i for i, layer in enumerate(decoder.layers) if layer.block == block]
            observer = Observer({i: decoder.modules[i] for i in indexes}, grams=False)
            with decoder.weights.of(block):
                for number, batch in enumerate(batches):
                    with observer.watching():
                        hidden[number] = decoder.run_block(block, batch, hidden[number])
            unknown |= {decoder.layers[i].name: why for i, why in observer.unknown().items()}
        return unknown, hidden

    @torch.no_grad()
    def summarise(
        self, metric: Expression, reductions: Sequence[Reduction]
    ) -> dict[Reduction, NDArray[np.float64]]:
        """Return reductions of a metric's dense scores, one number a block, or quantiles a layer.

        Raises:
            ScoreError: When scores are not finite.
        """
        self._prepare(metric)
        found: dict[Reduction, list[float | NDArray[np.float64]]] = {name: [] for name in reductions}
        hidden = self._entering()
        for block in range(len(self._decoder.blocks)):
            with self._decoder.weights.of(block):
                hidden, scores = self._scored(block, hidden, metric)
            for name in reductions if scores else ():
                if name == "quantiles":
                    found[name] += [quantiles(s) for s in scores]
                else:
                    found[name].append(of_block(scores, name, lambda work, items: [work(x) for x in items]))
            del scores  # before the next block's weights come
        return {name: np.array(values) for name, values in found.items()}

    @torch.no_grad()
    def prune(
        self,
        candidate: Candidate,
        *,
        pattern: str = "unstructured",
        statistics: str = "one-shot",
        repair: str = "none",
        keep: Callable[[int, list[PrunedLayer]], list[PrunedLayer]] = lambda _, layers: layers,
    ) -> list[PrunedLayer]:
        """Prune the model and return what was done, in model order.

        With sequential statistics pruned blocks may keep all tokens from a layer behind them, such as an
        expert. It stays dense then, and is no layer of the decoder any more.

        Args:
            candidate: The rule; one ratio a layer of the decoder.
            pattern: ``unstructured`` or ``N:M``.
            statistics: ``one-shot`` or ``sequential``.
            repair: A name of ``REPAIRS``.
            keep: Called with a block that is done and what was done to its layers, while its weights are in
                memory; returns the latter with what became of them.

        Raises:
            PruningError: When the rule does not fit the model or statistics are not finite.
            ScoreError: When scores are not finite.
        """
        self._check(candidate, pattern)
        self._prepare(candidate.metric)
        result: list[PrunedLayer] = []
        self._left.clear()
        hidden = self._entering()
        for block in range(len(self._decoder.blocks)):
            with self._decoder.weights.of(block):
                after, done = self._prune_block(block, hidden, candidate, pattern, repair)
                hidden = self._run(block, hidden) if statistics == "sequential" else after
                result += keep(block, done)
        self._decoder.leave_dense(self._left)
        return result

    def _scored(
        self, block: int, hidden: list[Tensor], metric: Expression
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the hidden states after a block, and the scores of its layers."""
        after, held = self._measured(block, hidden, metric)
        return after, [h.dense_scores(metric) for h in held]

    def _prune_block(
        self, block: int, hidden: list[Tensor], candidate: Candidate, pattern: str, repair: str
    ) -> tuple[list[Tensor], list[PrunedLayer]]:
        """Return the hidden states after the dense block, and what was done to its layers."""
        after, held = self._measured(block, hidden, candidate.metric)
        return after, [self._prune_layer(layer, candidate, pattern, repair) for layer in held]

    def _check(self, candidate: Candidate, pattern: str) -> None:
        counts = parse_pattern(pattern)
        if len(candidate.ratios) != len(self._decoder.layers):
            raise PruningError(
                f"expected one ratio for each of the model's {len(self._decoder.layers)} layers, got "
                f"{len(candidate.ratios)}"
            )
        for layer in self._decoder.layers:
            if counts and layer.columns % counts[1]:
                raise PruningError(
                    f"expected layers whose inputs divide by {counts[1]} for the pattern {pattern}, got "
                    f"{layer.columns} inputs in {layer.name}; choose another pattern"
                )

    def _entering(self) -> list[Tensor]:
        return [batch.hidden for batch in self._batches]

    def _prepare(self, metric: Expression) -> None:
        """Compute what only the dense model as a whole gives."""
        if "G" not in with_sources(metric.leaves) or self._gradients:
            return
        decoder, hidden = self._decoder, self._entering()
        with (
            scratch() as folder,
            hidden_states(folder, decoder, self._ids, hidden[0]) as states,
        ):
            for block in range(len(decoder.blocks)):
                keep_states(states, block, hidden)
                with decoder.weights.of(block):
                    hidden = self._run(block, hidden)
            keep_states(states, len(decoder.blocks), hidden)
            for _, gradients in root_mean_square_gradients(decoder, self._ids, states):
                self._gradients |= {i: gradient.cpu() for i, gradient in gradients.items()}

    def _run(self, block: int, hidden: list[Tensor]) -> list[Tensor]:
        pairs = zip(self._batches, hidden, strict=True)
        return [self._decoder.run_block(block, batch, states) for batch, states in pairs]

    def _measured(
        self, block: int, hidden: list[Tensor], metric: Expression
    ) -> tuple[list[Tensor], list[HeldLayer]]:
        """Return the hidden states after a block, and its layers with the statistics of their inputs."""
        decoder = self._decoder
        indexes = [i for i, layer in enumerate(decoder.layers) if layer.block == block]
        observer = Observer({i: decoder.modules[i] for i in indexes})
        after = []
        for batch, states in zip(self._batches, hidden, strict=True):
            with observer.watching():
                after.append(decoder.run_block(block, batch, states))
        held = []
        wanted = with_sources(metric.leaves)
        why = observer.unknown()  # behind pruned blocks there may be more than in the dense model
        self._left |= {decoder.layers[i].name: reason for i, reason in why.items()}
        for members, found in observer.finish(inverse="D" in wanted, without=why):
            broken = [name for name, value in found.items() if not bool(value.isfinite().all())]
            if broken:
                raise PruningError(
                    f"statistics of block {block} are not finite ({broken[0]}); the model overflows on this "
                    "text: try --dtype float32"
                )
            for i in members:
                energy, size = observed_outputs(decoder.modules[i], found)
                leaves = {name: found[name].reshape(1, -1) for name in "XMVD" if name in found}
                leaves["Y"] = size.reshape(-1, 1)
                if "G" in wanted:
                    leaves["G"] = self._gradients[i].to(decoder.device)
                statistics = LayerStatistics(found["H"], energy, leaves)
                weights = weight_matrix(decoder.modules[i])
                held.append(HeldLayer(i, decoder.layers[i], weights, statistics, rows=1))
        return after, sorted(held, key=lambda h: h.index)

    def _prune_layer(self, held: HeldLayer, candidate: Candidate, pattern: str, repair: str) -> PrunedLayer:
        """Change a layer's module, and so the dense weights that ``held`` looks at, in place."""
        module = self._decoder.modules[held.index]
        removed = held.mask(candidate, pattern)
        dense = held.weights.float()
        new, shift = REPAIRS[repair](dense, removed, held.gram, held.leaves["M"].flatten())
        if not bool(new.isfinite().all()):
            raise PruningError(f"the repair {repair} gives weights that are not finite in {held.layer.name}")
        whole = float(held.energy.sum())
        error, repaired = (
            float(quadratic_form(lost, held.gram).sum()) / whole if whole > 0 else 0.0
            for lost in (dense * removed, dense - new)
        )
        bias = module.bias if shift is not None else None
        if isinstance(bias, Tensor) and shift is not None:
            bias.data.add_(shift.to(bias.dtype))
        stored = weight_of(module).data
        stored.copy_(oriented(module, new))
        zeros = stored.numel() - int(stored.count_nonzero())
        shifted = isinstance(bias, Tensor)
        return PrunedLayer(held.layer, candidate.ratios[held.index], zeros, error, repaired, shifted)
